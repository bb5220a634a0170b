"""What one tensor is to the module that it adapts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

__all__ = ["FACTOR_SLOTS", "AdapterKey", "Slot"]


class Slot(str):
    """The role of a tensor. ``DOWN`` is A of shape ``(r, in)``, ``UP`` is B of ``(out, r)``.

    Roles are open: those that several variants share have names here, any other belongs to the
    variant that has it. Two of one name are one object.
    """

    __slots__ = ()
    _known: ClassVar[dict[str, Slot]] = {}

    DOWN: ClassVar[Slot]
    UP: ClassVar[Slot]
    EMBEDDING_DOWN: ClassVar[Slot]
    """A of an embedding, ``(r, num_embeddings)``."""
    EMBEDDING_UP: ClassVar[Slot]
    """B of an embedding, ``(dim, r)``."""
    MID: ClassVar[Slot]
    """The core of a convolution in three parts (CP), ``(r, r, *kernel)``."""
    UP_BIAS: ClassVar[Slot]
    """An additive bias ``(out,)``, scaled like the delta."""
    BIAS: ClassVar[Slot]
    """An additive bias ``(out,)`` that no scale multiplies."""
    MAGNITUDE: ClassVar[Slot]
    """DoRA's norms, one for each output (or each embedding dimension)."""
    ALPHA: ClassVar[Slot]
    """A scalar; the scale is ``alpha / rank``."""
    SINGULAR: ClassVar[Slot]
    """AdaLoRA's ``(r, 1)`` diagonal between the factors."""
    DIAGONAL: ClassVar[Slot]
    """KaSA's ``(r,)`` diagonal between the factors."""
    ROWS: ClassVar[Slot]
    """New values of some rows of an embedding, ``(len(indices), dim)``."""
    STATE: ClassVar[Slot]
    """Something that only training needs; the delta does not depend on it."""
    IA3: ClassVar[Slot]
    """LyCORIS' (IA)³: factors of rows or columns, which kohya's files call ``weight``."""

    def __new__(cls, name: str) -> Slot:
        """Return the role called ``name``."""
        known = cls._known.get(name)
        if known is None:
            known = cls._known.setdefault(str(name), super().__new__(cls, name))
        return known

    @property
    def value(self) -> str:
        """The name as a plain text."""
        return str(self)


Slot.DOWN = Slot("down")
Slot.UP = Slot("up")
Slot.EMBEDDING_DOWN = Slot("embedding down")
Slot.EMBEDDING_UP = Slot("embedding up")
Slot.MID = Slot("mid")
Slot.UP_BIAS = Slot("up bias")
Slot.BIAS = Slot("bias")
Slot.MAGNITUDE = Slot("magnitude")
Slot.ALPHA = Slot("alpha")
Slot.SINGULAR = Slot("singular")
Slot.DIAGONAL = Slot("diagonal")
Slot.ROWS = Slot("rows")
Slot.STATE = Slot("state")
Slot.IA3 = Slot("ia3")

FACTOR_SLOTS: Final = frozenset((Slot.DOWN, Slot.UP, Slot.EMBEDDING_DOWN, Slot.EMBEDDING_UP))
"""A and B, which make a key recognisable as an adapter's; variants have more of their own."""


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """What a tensor's name says: which module, which role, and which of several adapters."""

    module: str
    slot: Slot
    adapter: str | None = None
