"""Input embeddings, output heads, and which models share one weight between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["EMBEDDING_LEAVES", "HEAD_LEAVES", "head_name", "tie_flag"]

EMBEDDING_LEAVES: Final = frozenset(
    (
        "embed_tokens",
        "wte",
        "tokens_embed",
        "word_embeddings",
        "embed_in",
        "shared",
        "tok_embeddings",
    )
)
HEAD_LEAVES: Final = frozenset(("lm_head", "embed_out", "output_projection", "proj_out", "lm_loss"))

HEADS: Final = {
    "gpt_neox": "embed_out",
    "gpt_neox_japanese": "embed_out",
    "biogpt": "output_projection",
    "rwkv": "head",
    "xlnet": "lm_loss",
}
"""Model type to the name of its head, where that is not ``lm_head``."""

GENERATIVE: Final = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def head_name(config: Mapping[str, Any]) -> str | None:
    """Return the module name of a generative model's head, or ``None`` for other models."""
    architectures = config.get("architectures") or []
    if not any(str(name).endswith(GENERATIVE) for name in architectures):
        return None
    return HEADS.get(str(config.get("model_type")), "lm_head")


def tie_flag(config: Mapping[str, Any]) -> bool | None:
    """Return ``tie_word_embeddings``, of the model or of its text part; ``None`` if not said."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        if isinstance(part, dict) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None
