"""The difference of a bias whose weight is not adapted."""

from __future__ import annotations

from loratool.adapter.parameters import WholeParameters
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Slots

__all__ = ["VARIANT"]

CLAIM = {"signs": ["bias"], "priority": 6}


class Bias(WholeParameters):
    """What is added to a bias, without any scale."""

    name = "bias"
    words = "the difference of a bias"
    has_matrix = False

    def fits(self, slots: Slots, enabled: tuple[bool, ...]) -> bool:
        """See :class:`Variant`."""
        return slots.keys() == {Slot.BIAS}


VARIANT = Bias()
