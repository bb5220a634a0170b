"""GLoRA (arXiv 2306.07967) as LyCORIS stores it: ``W·a1·a2 + b1·b2``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Variant

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["a1", "b1"],
    "suffixes": {
        ".a1.weight": "a1",
        ".a2.weight": "a2",
        ".b1.weight": "b1",
        ".b2.weight": "b2",
        ".bm.weight": "bm",
    },
    "evidence": 2,
    "priority": 10,
}

A1, A2, B1, B2 = PARTS = tuple(Slot(name) for name in ("a1", "a2", "b1", "b2"))
CORE: Final = Slot("bm")


class Moved(Change):
    """``W + scale · (W·a1·a2 + b1·b2)``: a row depends on that row of W alone."""

    grain = (1, 0)

    def __init__(
        self, factors: tuple[Array, ...], core: Array | None, scale: float, *, is_old: bool
    ) -> None:
        self.factors = factors
        self.core = core
        self.scale = scale
        self.is_old = is_old

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        from loratool.math.dense_variants import glora_delta

        a1, a2, b1, b2 = self.factors
        rows = slice(row, row + part.shape[0])
        if self.is_old:
            b2 = b2[rows]
        else:
            b1 = b1[rows]
        return glora_delta(part, a1, a2, b1, b2, self.core, is_old=self.is_old) * self.scale


class Glora(Variant):
    """A delta that depends on the base's weight, and one that does not."""

    name = "glora"
    words = "GLoRA, a delta that depends on the base's weight"
    needs_base = True
    has_change = True

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """Read either layout: LyCORIS before 2.0 stores ``(r, in)`` and ``(out, r)`` in b1, b2.

        Where the shapes fit both, the smaller rank is meant.
        """
        a1, a2, b1, b2 = (shapes[slot] for slot in PARTS)
        is_new = a1[1] == a2[0] == b1[1] == b2[0]
        is_old = a1[0] == a2[1] == b1[0] == b2[1]
        if is_old and (not is_new or a1[0] < a1[1]):
            return Geometry(a1[0], b2[0], math.prod(b1[1:]))
        return Geometry(b2[0], b1[0], math.prod(b2[1:]))

    def places(self, site: Site, shape: tuple[int, ...]) -> bool:
        """See :class:`Variant`."""
        from loratool.math.dense_variants import is_old_glora

        a1, a2, b1, b2 = (site.slots[slot].spec.shape for slot in PARTS)
        columns = math.prod(shape[1:])
        if is_old_glora(shape, a1, a2, b1, b2):
            return a1[1] == a2[0] == math.prod(b1[1:]) == columns
        core = site.slots.get(CORE)
        kernel = math.prod(core.spec.shape[2:]) if core is not None else 1
        is_moved = a1[0] == a2[1] == shape[1]
        return is_moved and b1[0] == shape[0] and math.prod(b2[1:]) * kernel == columns

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        from loratool.math.dense_variants import is_old_glora

        factors = tuple(values[slot] for slot in PARTS)
        is_old = is_old_glora(shape, *(factor.shape for factor in factors))
        return Moved(factors, values.get(CORE), scale, is_old=is_old)

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (A1, B1)

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return 1


VARIANT = Glora()
