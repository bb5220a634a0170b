"""BOFT (arXiv 2311.06243) as LyCORIS stores it: butterflies of rotations of outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Slots, Variant

__all__ = ["VARIANT"]

CLAIM = {"signs": ["oft_blocks"], "evidence": 2, "priority": 10}

BLOCKS: Final = Slot("oft_blocks")
RESCALE: Final = Slot("rescale")


class Butterflied(Change):
    """``rescale · R_m … R_1 W``; each stage mixes rows from further apart."""

    grain = (0, 1)

    def __init__(self, blocks: Array, limit: float, rescale: Array | None) -> None:
        self.blocks = blocks
        self.limit = limit
        self.rescale = rescale

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        from loratool.math.dense_variants import boft_delta

        return boft_delta(part, self.blocks, self.limit, self.rescale)


class Boft(Variant):
    """Alpha is the largest norm of all rotations together, by the number of rows; 0 is none."""

    name = "boft"
    words = "BOFT, butterfly rotations of the base's outputs"
    is_scaled = False
    keeps_alpha = True
    needs_base = True
    has_change = True
    needs_whole = True

    def fits(self, slots: Slots, enabled: tuple[bool, ...]) -> bool:
        """See :class:`Variant`."""
        return len(slots[BLOCKS].spec.shape) == 4

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        _, count, size, _ = shapes[BLOCKS]
        return Geometry(size, count * size, 0)

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        rescale = site.slots.get(RESCALE)
        if rescale is not None and rescale.spec.elements != site.out_features:
            shape = list(rescale.spec.shape)
            yield "LT003", f"rescales {shape} rows, and rotates {site.out_features}"

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        limit = float(values[Slot.ALPHA].reshape(-1)[0]) if Slot.ALPHA in values else 0.0
        return Butterflied(values[BLOCKS], limit, values.get(RESCALE))


VARIANT = Boft()
