"""What one tensor is to the module that it adapts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["FACTOR_SLOTS", "AdapterKey", "Slot"]


class Slot(Enum):
    """The role of a tensor. ``DOWN`` is A of shape ``(r, in)``, ``UP`` is B of ``(out, r)``."""

    DOWN = "down"
    UP = "up"
    EMBEDDING_DOWN = "embedding down"
    """A of an embedding, ``(r, num_embeddings)``."""
    EMBEDDING_UP = "embedding up"
    """B of an embedding, ``(dim, r)``."""
    UP_BIAS = "up bias"
    """An additive bias ``(out,)``, scaled like the delta."""
    MAGNITUDE = "magnitude"
    """DoRA's norms, one for each output (or each embedding dimension)."""
    ALPHA = "alpha"
    """A scalar; the scale is ``alpha / rank``."""
    SINGULAR = "singular"
    """AdaLoRA's ``(r, 1)`` diagonal between the factors."""
    DIAGONAL = "diagonal"
    """KaSA's ``(r,)`` diagonal between the factors."""
    ROWS = "rows"
    """New values of some rows of an embedding, ``(len(indices), dim)``."""
    STATE = "state"
    """Something that only training needs; the delta does not depend on it."""


FACTOR_SLOTS = frozenset((Slot.DOWN, Slot.UP, Slot.EMBEDDING_DOWN, Slot.EMBEDDING_UP))
"""The slots that make a key recognisable as an adapter's."""


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """What a tensor's name says: which module, which role, and which of several adapters."""

    module: str
    slot: Slot
    adapter: str | None = None
