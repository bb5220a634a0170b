"""Input embeddings, output heads, and which models share one weight between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from loratool.adapter.model import HEAD_LEAVES

__all__ = [
    "EMBEDDING_LEAVES",
    "HEAD_LEAVES",
    "MASKED_HEADS",
    "architectures",
    "head_name",
    "tie_flag",
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


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the classes that ``config.json`` names."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def head_name(config: Mapping[str, Any], tasks: Collection[str] = ()) -> str | None:
    """Return the module name of the head that may share the embedding, or ``None``.

    Args:
        config: The base's configuration.
        tasks: The adapters' task types; a classifier has no such head, whatever the base was.
    """
    if not config or any(task in OTHER_TASKS for task in tasks):
        return None
    classes = architectures(config)
    kind = str(config.get("model_type"))
    if any(name.endswith("ForMaskedLM") for name in classes):
        return MASKED_HEADS.get(kind, "lm_head")
    generative = (
        any(name.endswith(GENERATIVE) for name in classes)
        or any(task in GENERATIVE_TASKS for task in tasks)
        or not classes
    )
    return HEADS.get(kind, "lm_head") if generative else None


def tie_flag(config: Mapping[str, Any]) -> bool | None:
    """Return ``tie_word_embeddings``, of the model or of its text part; ``None`` if not said."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        if isinstance(part, dict) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None
