"""Tables of tokens, output heads, and which models share one weight between them."""

from __future__ import annotations

from typing import Final

from loratool.adapter.model import HEAD_LEAVES

__all__ = [
    "ALWAYS_TIED",
    "APART_BIASES",
    "COMPOSED",
    "EMBEDDING_LEAVES",
    "FLAG_KEPT",
    "GENERATIVE",
    "GENERATIVE_TASKS",
    "HEADS",
    "HEAD_LEAVES",
    "INNER_HEADS",
    "INPUT_STACKS",
    "OTHER_TASKS",
    "OTHER_TIES",
    "READ_DIRECTLY",
    "SHARED",
    "SHARED_TABLES",
    "TABLES",
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
    "kosmos-2.5": "text_model.lm_head",
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
    "pix2struct": "decoder.lm_head",
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
    "ultrabert": "head.decoder",
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

APART_BIASES: Final = frozenset(("bridgetower", "esm", "gte", "lxmert", "ultrabert", "vilt"))
"""Model types whose ``decoder`` has no bias to share with the module that it is in."""

_WORDS: Final = "embeddings.word_embeddings"

TABLES: Final = (
    dict.fromkeys(("bert", "bert-generation", "big_bird", "blip_text_model"), f"bert.{_WORDS}")
    | dict.fromkeys(("camembert", "jina_embeddings_v3", "roberta"), f"roberta.{_WORDS}")
    | dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xmod"), f"roberta.{_WORDS}")
    | {
        kind: f"{kind.replace('-', '_')}.{_WORDS}"
        for kind in (
            *("albert", "convbert", "data2vec-text", "deberta", "distilbert", "electra", "ernie"),
            *("esm", "fnet", "funnel", "git", "gte", "layoutlm", "longformer", "lxmert"),
            *("mobilebert", "mpnet", "mra", "nomic_bert", "nystromformer", "roberta-prelayernorm"),
            *("roc_bert", "roformer", "tapas", "visual_bert", "yoso"),
        )
    }
    | dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small"), "model.shared")
    | dict.fromkeys(("m2m_100", "marian", "mbart", "mvp", "nllb-moe", "pegasus"), "model.shared")
    | dict.fromkeys(("pegasus_x", "plbart"), "model.shared")
    | dict.fromkeys(("longt5", "mt5", "pop2piano", "switch_transformers", "t5"), "shared")
    | dict.fromkeys(("seamless_m4t", "seamless_m4t_v2", "udop", "umt5"), "shared")
    | dict.fromkeys(("opt", "speech_to_text", "whisper", "t5gemma"), "model.decoder.embed_tokens")
    | dict.fromkeys(("codegen", "dbrx", "gpt2", "gpt_bigcode", "gpt_neo"), "transformer.wte")
    | dict.fromkeys(("gptj", "imagegpt", "mpt"), "transformer.wte")
    | dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), "backbone.embeddings")
    | dict.fromkeys(("modernbert", "modernbert-decoder"), "model.embeddings.tok_embeddings")
    | dict.fromkeys(("bloom", "falcon"), "transformer.word_embeddings")
    | dict.fromkeys(("flaubert", "xlm"), "transformer.embeddings")
    | {
        "biogpt": "biogpt.embed_tokens",
        "deberta-v2": f"deberta.{_WORDS}",
        "florence2": "model.language_model.shared",
        "gpt_neox": "gpt_neox.embed_in",
        "gpt_neox_japanese": "gpt_neox_japanese.embed_in",
        "led": "led.shared",
        "megatron-bert": f"bert.{_WORDS}",
        "openai-gpt": "transformer.tokens_embed",
        "prophetnet": "prophetnet.word_embeddings",
        "rwkv": "rwkv.embeddings",
        "squeezebert": f"transformer.{_WORDS}",
        "xlnet": "transformer.word_embedding",
    }
)
"""Model type to its table of tokens, where that is not ``embed_tokens`` beside its layers."""

SHARED: Final = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
"""The tables of an encoder-decoder that are one, the one that is copied to the others first."""

SHARED_TABLES: Final = {
    kind: SHARED for kind, path in TABLES.items() if path.rpartition(".")[2] == "shared"
} | {
    "fsmt": ("decoder.embed_tokens", "encoder.embed_tokens"),
    "prophetnet": ("word_embeddings", "encoder.word_embeddings", "decoder.word_embeddings"),
    "seamless_m4t": ("shared", "text_encoder.embed_tokens", "text_decoder.embed_tokens"),
    "seamless_m4t_v2": ("shared", "text_encoder.embed_tokens", "text_decoder.embed_tokens"),
    "t5gemma2": ("encoder.text_model.embed_tokens", "decoder.embed_tokens"),
}
"""Model type to such tables of its own."""

INPUT_STACKS: Final = {
    "fsmt": None,
    "marian": "encoder",
    "seamless_m4t": "text_decoder",
    "seamless_m4t_v2": "text_decoder",
    "t5gemma": None,
}
"""Model type to the stack whose table counts as the input embedding, where the first does not.

With ``None`` it is none of those that share a weight.
"""

ALWAYS_TIED: Final = frozenset(("longt5", "mt5", "pop2piano", "t5", "udop", "umt5", "vilt"))
"""Model types whose weights are tied whatever ``tie_word_embeddings`` says."""

COMPOSED: Final = frozenset(("encoder-decoder", "speech-encoder-decoder", "vision-encoder-decoder"))
"""Model types with a decoder of any class inside, which ties as it does by itself."""

FLAG_KEPT: Final = (
    ALWAYS_TIED
    | COMPOSED
    | {
        "seamless_m4t",
        "seamless_m4t_v2",
        "switch_transformers",
        "t5gemma2",
    }
)
"""Model types to which it means more: whether the decoder's outputs are scaled, or other ties.

In those that are composed it means nothing.

Untied in the configuration they would compute something else; their loader keeps two weights apart
whose stored values differ.
"""

OTHER_TIES: Final = frozenset(("blt", "csm", "diffusion_gemma", "flava", "luke", "neomme"))
"""Model types that share other weights than a table of tokens and a head."""

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
    "DoubleHeadsModel",
    "GenerationDecoder",
    "ForCausalImageModeling",
    "ForSpeechToText",
    "ForTextToText",
    "ForVisionText2Text",
)
GENERATIVE_TASKS: Final = frozenset(("CAUSAL_LM", "SEQ_2_SEQ_LM"))
OTHER_TASKS: Final = frozenset(("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"))
"""Classes and task types with a head over the vocabulary, and task types without one."""
