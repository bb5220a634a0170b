"""Convolutions in three factors: LyCORIS' LoCon with a core (``lora_mid``), a CP decomposition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Geometry, Read, Settings, Shapes, Variant

__all__ = ["VARIANT"]

CLAIM = {"signs": ["mid"], "priority": 9}


class Cp(Variant):
    """``Σ up[o, m] · mid[m, n, …] · down[n, i]``; the core folds into A."""

    name = "cp"
    words = "a convolution in three factors (CP, lora_mid)"
    has_factors = True
    kernel_slots = frozenset((Slot.DOWN, Slot.MID))

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        down, up = shapes[Slot.DOWN], shapes[Slot.UP]
        return Geometry(down[0], up[0], down[1])

    def places(self, site: Site, shape: tuple[int, ...]) -> bool:
        """See :class:`Variant`."""
        sides = (site.out_features, site.in_features)
        return sides == shape[:2] and self.kernel(site) in (shape[2:], ())

    def kernel(self, site: Site) -> tuple[int, ...] | None:
        """See :class:`Variant`."""
        return site.slots[Slot.MID].spec.shape[2:]

    def width(self, site: Site, shape: tuple[int, ...] | None = None) -> int:
        """See :class:`Variant`."""
        return site.in_features * math.prod(self.kernel(site) or ())

    def factor_rank(self, site: Site) -> int:
        """See :class:`Variant`."""
        return site.slots[Slot.MID].spec.shape[0]

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (Slot.UP,)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import fold_mid

        up, down = fold_mid(*(read(site.slots[s]) for s in (Slot.UP, Slot.DOWN, Slot.MID)))
        return down, up


VARIANT = Cp()
