"""Diag-OFT (arXiv 2306.07280) as LyCORIS and kohya store it: rotations of blocks of outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Slots, Variant

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["oft_blocks"],
    "suffixes": {".oft_blocks": "oft_blocks", ".rescale": "rescale"},
    "evidence": 2,
    "priority": 10,
}

BLOCKS: Final = Slot("oft_blocks")
RESCALE: Final = Slot("rescale")


class Rotated(Change):
    """``rescale · Rᵀ W`` in each block of rows."""

    def __init__(self, rotations: Array, rescale: Array | None) -> None:
        self.rotations = rotations
        self.rescale = rescale
        self.grain = (rotations.shape[1], 1)

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        from loratool.math.dense_variants import rotation_delta

        size = self.rotations.shape[1]
        first, count = row // size, part.shape[0] // size
        rows = self.rescale[row : row + part.shape[0]] if self.rescale is not None else None
        return rotation_delta(part, self.rotations[first : first + count], rows)


class Oft(Variant):
    """Alpha is the largest norm of all rotations together, by the number of rows; 0 is none."""

    name = "oft"
    words = "OFT, rotations of the base's outputs"
    is_scaled = False
    keeps_alpha = True
    needs_base = True
    has_change = True

    def fits(self, slots: Slots, enabled: tuple[bool, ...]) -> bool:
        """See :class:`Variant`."""
        return len(slots[BLOCKS].spec.shape) != 4

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        count, size, _ = shapes[BLOCKS]
        return Geometry(size, count * size, 0)

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        rescale = site.slots.get(RESCALE)
        if rescale is not None and rescale.spec.elements != site.out_features:
            shape = list(rescale.spec.shape)
            yield "LT003", f"rescales {shape} rows, and rotates {site.out_features}"

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return site.slots[BLOCKS].spec.shape[1]

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        from loratool.math.dense_variants import rotations

        limit = float(values[Slot.ALPHA].reshape(-1)[0]) if Slot.ALPHA in values else 0.0
        return Rotated(rotations(values[BLOCKS], limit * shape[0]), values.get(RESCALE))


VARIANT = Oft()
