"""DoRA (arXiv 2402.09353): the changed weight, rescaled to trained norms."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.adapter.model import Site
from loratool.adapter.plain import Plain, matrix
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Change

__all__ = ["VARIANT"]

CLAIM = {"signs": ["magnitude"], "priority": 2}


class Decomposed(Change):
    """``m / ‖W + Δ‖ · (W + Δ)``; norms look at the whole weight."""

    grain = (0, 0)

    def __init__(self, delta: Array, magnitude: Array, *, is_of_inputs: bool) -> None:
        self.delta = delta
        self.magnitude = magnitude
        self.is_of_inputs = is_of_inputs

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        from loratool.math.dense_variants import dora_delta

        delta = self.delta.reshape(part.shape)
        return dora_delta(part, delta, self.magnitude, out_axis=not self.is_of_inputs)


class Dora(Plain):
    """Rows of ``W + Δ`` get the norms that were trained; merged by blocks of their own."""

    name = "dora"
    words = "a dora"
    is_decomposed = True
    is_linear = False
    needs_base = True
    has_change = True
    undetermined = (
        "is a DoRA: its delta is not B @ A but depends on the base's weight, so it cannot {verb} "
        "without a base"
    )

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return 1

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        roles = [slot for slot in (Slot.DOWN, Slot.EMBEDDING_DOWN) if slot in values]
        others = [slot for slot in (Slot.UP, Slot.EMBEDDING_UP) if slot in values]
        down, up = (matrix(values[slot]) for slot in (roles[0], others[0]))
        magnitude = values[Slot.MAGNITUDE]
        # Magnitudes of the outputs are (out,) here, those of the inputs (1, in, …).
        return Decomposed(scale * (up @ down), magnitude, is_of_inputs=magnitude.ndim > 1)


VARIANT = Dora()
