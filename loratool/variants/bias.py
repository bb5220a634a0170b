"""The difference of a bias whose weight is not adapted."""

from __future__ import annotations

import math

from loratool.adapter.slots import Slot
from loratool.adapter.variant import Geometry, Settings, Shapes, Slots, Variant

__all__ = ["VARIANT"]

CLAIM = {"signs": ["bias"], "priority": 6}


class Bias(Variant):
    """What is added to a bias, without any scale."""

    name = "bias"
    words = "the difference of a bias"
    is_scaled = False
    has_matrix = False

    def fits(self, slots: Slots, enabled: tuple[bool, ...]) -> bool:
        """See :class:`Variant`."""
        return slots.keys() == {Slot.BIAS}

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        return Geometry(1, math.prod(shapes[Slot.BIAS]), 1)


VARIANT = Bias()
