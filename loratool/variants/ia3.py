"""(IA)³ (arXiv 2205.05638) as LyCORIS stores it: how far rows or columns are scaled from one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Variant
from loratool.errors import AdapterError

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["ia3"],
    "suffixes": {".on_input": "on_input"},
    "evidence": 1,
    "priority": 5,
}

ON_INPUT: Final = Slot("on_input")


class Scaled(Change):
    """``W + W ∘ scale`` along the rows or columns."""

    def __init__(self, scale: Array, *, is_on_input: bool) -> None:
        self.scale = scale.reshape(-1)
        self.is_on_input = is_on_input

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        from loratool.math.dense_variants import ia3_delta

        axis = 1 if self.is_on_input else 0
        start = column if self.is_on_input else row
        return ia3_delta(part, self.scale[start : start + part.shape[axis]], self.is_on_input)


class Ia3(Variant):
    """Which of the two it scales is a tensor of its own."""

    name = "ia3"
    words = "(IA)³, factors of the base's rows or columns"
    is_scaled = False
    needs_base = True
    has_change = True

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        return Geometry(1, math.prod(shapes[Slot.IA3]), 0)

    def places(self, site: Site, shape: tuple[int, ...]) -> bool:
        """Only the flag's value tells whether rows or columns are meant."""
        return site.out_features in shape[:2]

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (Slot.IA3,)

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return 1

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        flag = values.get(ON_INPUT)
        is_on_input = bool(flag is not None and flag.any())
        size, side = site.out_features, shape[1 if is_on_input else 0]
        if size != side:
            raise AdapterError(
                site.label,
                f"scales {size} {'inputs' if is_on_input else 'outputs'} of a weight that has "
                f"{side}",
                code="LT022",
            )
        return Scaled(values[Slot.IA3], is_on_input=is_on_input)


VARIANT = Ia3()
