"""Input embeddings, output heads, and which models share one weight between them."""

from __future__ import annotations

from typing import Final

from loratool.adapter.model import HEAD_LEAVES

__all__ = [
    "EMBEDDING_LEAVES",
    "GENERATIVE",
    "GENERATIVE_TASKS",
    "HEADS",
    "HEAD_LEAVES",
    "MASKED_HEADS",
    "OTHER_TASKS",
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

HEADS: Final = {
    "gpt_neox": "embed_out",
    "gpt_neox_japanese": "embed_out",
    "biogpt": "output_projection",
    "rwkv": "head",
    "xlnet": "lm_loss",
    "whisper": "proj_out",
}
"""Model type to the name of its head, where that is not ``lm_head``."""

MASKED_HEADS: Final = {
    "albert": "predictions.decoder",
    "bert": "cls.predictions.decoder",
    "camembert": "lm_head.decoder",
    "deberta": "cls.predictions.decoder",
    "deberta-v2": "cls.predictions.decoder",
    "distilbert": "vocab_projector",
    "electra": "generator_lm_head",
    "esm": "lm_head.decoder",
    "mpnet": "lm_head.decoder",
    "roberta": "lm_head.decoder",
    "xlm-roberta": "lm_head.decoder",
}
"""Model type to the name of its masked-language-model head."""

GENERATIVE: Final = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
GENERATIVE_TASKS: Final = frozenset(("CAUSAL_LM", "SEQ_2_SEQ_LM"))
OTHER_TASKS: Final = frozenset(("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"))
"""Classes and task types with a head over the vocabulary, and task types without one."""
