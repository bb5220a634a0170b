"""Where the number that multiplies ``B @ A`` goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loratool.adapter.build import read_scalar
from loratool.adapter.part import Part
from loratool.adapter.slots import Slot
from loratool.values.expr import Constant

__all__ = ["AlphaScale", "ConfiguredScale", "FoldedScale", "MultiplierScale", "folded"]


@dataclass(frozen=True, slots=True)
class FoldedScale:
    """Nowhere: it has to be in the factors."""

    has_one_rank: bool = False

    def place(self, parts: Sequence[Part], *, fold: bool) -> list[Part]:
        """Return modules whose factors hold their scale."""
        return [folded(part) for part in parts]

    def record(self, part: Part) -> Constant | None:
        """Return nothing."""
        return None


@dataclass(frozen=True, slots=True)
class ConfiguredScale:
    """In a configuration, of each module."""

    has_one_rank: bool = False

    def place(self, parts: Sequence[Part], *, fold: bool) -> list[Part]:
        """Return modules as they are, unless their scale is to be in the factors."""
        return [folded(part) for part in parts] if fold else list(parts)

    def record(self, part: Part) -> Constant | None:
        """Return nothing: the configuration says it."""
        return None


@dataclass(frozen=True, slots=True)
class AlphaScale:
    """In an alpha tensor of each module."""

    has_one_rank: bool = False

    def place(self, parts: Sequence[Part], *, fold: bool) -> list[Part]:
        """Return modules as they are, unless their scale is to be in the factors."""
        return [folded(part) for part in parts] if fold else list(parts)

    def record(self, part: Part) -> Constant | None:
        """Return the alpha, where the module has one."""
        if part.variant.is_scaled:
            return Constant(part.written_alpha, (), "F32")
        stored = part.stored(Slot.ALPHA)
        if stored is None or not part.variant.keeps_alpha:
            return None
        return Constant(read_scalar(stored), (), "F32")


@dataclass(frozen=True, slots=True)
class MultiplierScale:
    """In a configuration: one number, the multiplier itself, for all modules."""

    has_one_rank: bool = True

    def place(self, parts: Sequence[Part], *, fold: bool) -> list[Part]:
        """Return modules of one scale: their own where it is the same, else 1."""
        is_common = len({part.scale for part in parts}) == 1
        return list(parts) if is_common and not fold else [folded(part) for part in parts]

    def record(self, part: Part) -> Constant | None:
        """Return nothing: the configuration says it."""
        return None


def folded(part: Part) -> Part:
    """Return a part whose factors hold its scale."""
    if part.scale == 1 or not part.is_plain:
        return part
    values = dict(part.values)
    up = part.slots[1]
    values[up] = values[up].scaled(part.scale)
    if Slot.UP_BIAS in values:
        values[Slot.UP_BIAS] = values[Slot.UP_BIAS].scaled(part.scale)
    note = f"its scale {part.scale:g} was multiplied into B"
    return replace(part, values=values, scale=1.0, alpha=None, notes=(*part.notes, note))
