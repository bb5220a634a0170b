"""One spelling for module paths that differ only by wrappers and by library versions.

Two names that canonicalise alike may mean the same module; whoever compares them has to make
sure that exactly one candidate does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

__all__ = ["STRUCTURE", "canonical_path", "single_towers"]

WRAPPERS: Final = frozenset(("model", "base_model", "module", "language_model", "_orig_mod"))
"""Components that wrappers and versions of transformers add, drop or move, before any layer."""

TOWERS: Final = {"text_model": False, "vision_model": True}
"""Components that name the only tower of a model; whether it is one for images."""

STRUCTURE: Final = frozenset(
    (
        "encoder",
        "decoder",
        "text_model",
        "vision_model",
        "vision_tower",
        "visual",
        "audio_tower",
        "text_encoder",
    )
)
"""Components that tell parts of a model apart: dropping one would change what is meant."""


@lru_cache(maxsize=1 << 17)
def canonical_path(module: str, towers: frozenset[str] = frozenset(TOWERS)) -> str:
    """Return the canonical spelling of a dotted module path.

    Args:
        module: The path.
        towers: Which of ``TOWERS`` say nothing, since the model has no other.
    """
    parts = module.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    kept: list[str] = []
    for index, part in enumerate(parts):
        is_tower = part in towers or (part == "vision_model" and "vision_tower" in kept)
        if index >= first or not (part in WRAPPERS or is_tower):
            kept.append(part)
    return ".".join(kept)


def single_towers(model_types: frozenset[str]) -> frozenset[str]:
    """Return which of ``TOWERS`` may be dropped for a model of these types (all, if unknown)."""
    if not model_types:
        return frozenset(TOWERS)
    kinds = {"vision" in kind for kind in model_types}
    return frozenset(tower for tower, is_vision in TOWERS.items() if is_vision in kinds)
