"""What variants made of A and B have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Geometry, Read, Settings, Shapes, Variant

__all__ = ["Plain", "matrix"]


class Plain(Variant):
    """``Δ = scale · B @ A``, with what lies between the two, multiplied into A."""

    name = "lora"
    is_plain = True
    has_factors = True

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        down = shapes.get(Slot.DOWN) or shapes.get(Slot.EMBEDDING_DOWN) or ()
        up = shapes.get(Slot.UP) or shapes.get(Slot.EMBEDDING_UP) or ()
        return Geometry(
            rank=down[0] if down else 0,
            out=up[0] if up else 0,
            into=down[1] if len(down) > 1 else 0,
        )

    def width(self, site: Site, shape: tuple[int, ...] | None = None) -> int:
        """See :class:`Variant`."""
        assert site.down is not None
        return math.prod(site.down.spec.shape[1:])

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return tuple(slot for slot in (Slot.UP, Slot.EMBEDDING_UP) if slot in slots)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        assert site.down is not None and site.up is not None
        down, up = matrix(read(site.down)), matrix(read(site.up))
        for slot in self.between:
            down = down * read(site.slots[slot]).reshape((-1, 1))
        return down, up


def matrix(factor: Array) -> Array:
    """Return a factor with its kernel flattened into the columns."""
    return factor.reshape((factor.shape[0], math.prod(factor.shape[1:])))
