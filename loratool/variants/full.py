"""Whole differences of weights (LyCORIS' ``diff``, and extractions of ComfyUI)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.parameters import WholeParameters
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Geometry, Settings, Shapes

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["diff"],
    "suffixes": {".diff": "diff", ".diff_b": "bias"},
    "evidence": 1,
    "priority": 8,
}

DIFF: Final = Slot("diff")


class Full(WholeParameters):
    """What is added to the weight, as it is."""

    name = "full"
    words = "a whole difference"
    kernel_slots = frozenset((DIFF,))
    parameters = MappingProxyType({DIFF: ("weight",)})

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        shape = shapes[DIFF]
        columns = math.prod(shape[1:])
        return Geometry(min(shape[0], columns), shape[0], columns)

    def difference_shape(self, site: Site) -> tuple[int, ...]:
        """See :class:`Variant`."""
        return site.slots[DIFF].spec.shape

    def difference(self, values: Mapping[Slot, Array]) -> Array:
        """See :class:`Variant`."""
        return values[DIFF]


VARIANT = Full()
