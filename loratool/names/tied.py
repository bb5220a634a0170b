"""Tables of tokens, output heads, and which models share one weight between them."""

from __future__ import annotations

from typing import Final

from loratool.adapter.model import HEAD_LEAVES

__all__ = [
    "ALWAYS_TIED",
    "APART_BIASES",
    "EMBEDDING_LEAVES",
    "GENERATIVE",
    "GENERATIVE_TASKS",
    "HEADS",
    "HEAD_LEAVES",
    "INNER_HEADS",
    "INPUT_STACKS",
    "OTHER_TASKS",
    "READ_DIRECTLY",
    "SCALED_BY_TIE",
    "SHARED_TABLES",
    "STACKS",
]

EMBEDDING_LEAVES: Final = frozenset(
    (
        "embed_tokens",
        "wte",
        "tokens_embed",
        "word_embeddings",
        "word_embedding",
        "embed_in",
        "shared",
        "tok_embeddings",
        "embeddings",
    )
)

_BERT: Final = "cls.predictions.decoder"
_ROBERTA: Final = "lm_head.decoder"

HEADS: Final = {
    "albert": "predictions.decoder",
    "bert": _BERT,
    "bert-generation": _ROBERTA,
    "big_bird": _BERT,
    "biogpt": "output_projection",
    "blip": f"text_decoder.{_BERT}",
    "blip_text_model": _BERT,
    "bridgetower": "mlm_score.decoder",
    "camembert": _ROBERTA,
    "canary": "proj_out",
    "cohere_asr": "proj_out",
    "convbert": "generator_lm_head",
    "data2vec-text": _ROBERTA,
    "deberta": _BERT,
    "deberta-v2": _BERT,
    "distilbert": "vocab_projector",
    "electra": "generator_lm_head",
    "ernie": _BERT,
    "esm": _ROBERTA,
    "flaubert": "pred_layer.proj",
    "fnet": _BERT,
    "fsmt": "decoder.output_projection",
    "git": "output",
    "gpt_neox": "embed_out",
    "gpt_neox_japanese": "embed_out",
    "gte": _ROBERTA,
    "ibert": _ROBERTA,
    "jina_embeddings_v3": _ROBERTA,
    "kosmos-2": "text_model.lm_head",
    "layoutlm": _BERT,
    "longformer": _ROBERTA,
    "lxmert": _BERT,
    "megatron-bert": _BERT,
    "mobilebert": _BERT,
    "modernbert": "decoder",
    "modernbert-decoder": "decoder",
    "moonshine": "proj_out",
    "moonshine_streaming": "proj_out",
    "mpnet": _ROBERTA,
    "mra": _BERT,
    "nomic_bert": _BERT,
    "nystromformer": _BERT,
    "roberta": _ROBERTA,
    "roberta-prelayernorm": _ROBERTA,
    "roc_bert": _BERT,
    "roformer": _BERT,
    "rwkv": "head",
    "speecht5": "text_decoder_postnet.lm_head",
    "squeezebert": _BERT,
    "t5gemma": "lm_head.out_proj",
    "t5gemma2": "lm_head.out_proj",
    "tapas": _BERT,
    "trocr": "output_projection",
    "vilt": "mlm_score.decoder",
    "visual_bert": _BERT,
    "whisper": "proj_out",
    "xlm": "pred_layer.proj",
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
    "xlnet": "lm_loss",
    "xmod": _ROBERTA,
    "yoso": _BERT,
}
"""Model type to the name of its head over the vocabulary, where that is not ``lm_head``."""

INNER_HEADS: Final = tuple(sorted({head for head in HEADS.values() if head.endswith(".decoder")}))
"""Heads inside a module that other heads have too: no list of saved modules need name them."""

APART_BIASES: Final = frozenset(("bridgetower", "esm", "gte", "lxmert", "vilt"))
"""Model types whose ``decoder`` has no bias to share with the module that it is in."""

STACKS: Final = ("encoder", "decoder", "text_encoder", "text_decoder")
"""The parts of an encoder-decoder that each have a table of tokens."""

SHARED_TABLES: Final = dict.fromkeys(
    (
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "florence2",
        "led",
        "longt5",
        "m2m_100",
        "marian",
        "mbart",
        "mt5",
        "mvp",
        "nllb-moe",
        "pegasus",
        "pegasus_x",
        "plbart",
        "pop2piano",
        "seamless_m4t",
        "seamless_m4t_v2",
        "switch_transformers",
        "t5",
        "udop",
        "umt5",
    ),
    ("shared", "embed_tokens"),
) | {"prophetnet": ("word_embeddings", "word_embeddings")}
"""Model type to the name of the table that all stacks share, and of that of each stack."""

INPUT_STACKS: Final = {"fsmt": None, "marian": "encoder"}
"""Model type to the stack whose table counts as the input embedding, where the first does not."""

ALWAYS_TIED: Final = frozenset(("longt5", "mt5", "pop2piano", "t5", "udop", "umt5", "vilt"))
"""Model types whose weights are tied whatever ``tie_word_embeddings`` says."""

SCALED_BY_TIE: Final = ALWAYS_TIED | {"switch_transformers"}
"""Model types that read it otherwise: as whether the decoder's outputs are scaled, or not at all.

Untied in the configuration they would compute something else; their loader keeps two weights apart
whose stored values differ.
"""

READ_DIRECTLY: Final = {
    "deberta": ("word_embeddings",),
    "deberta-v2": ("word_embeddings",),
    "mobilebert": ("cls.predictions.decoder", "cls.predictions.dense"),
}
"""Model type to the modules whose weight its head over the vocabulary reads without calling them.

That is so in DeBERTa only where its head is not the old one (``legacy`` is false).
"""

GENERATIVE: Final = (
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForPreTraining",
    "MTModel",
)
GENERATIVE_TASKS: Final = frozenset(("CAUSAL_LM", "SEQ_2_SEQ_LM"))
OTHER_TASKS: Final = frozenset(("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"))
"""Classes and task types with a head over the vocabulary, and task types without one."""
