"""Bat, MiSS's other form: blocks of columns that are multiplied and added to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.turned import Turned
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Slots

__all__ = ["VARIANT"]

CLAIM = {"signs": ["miss_block", "bone_block"], "evidence": 2, "priority": 10}

BLOCK: Final = Slot("miss_block")
OLD: Final = Slot("bone_block")


class Batted(Change):
    """``T + T B + B`` of each tile T of a weight, with the B of its rows."""

    def __init__(self, blocks: Array) -> None:
        self.blocks = blocks
        self.grain = blocks.shape[1:]

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        size = self.blocks.shape[1]
        first, count = row // size, part.shape[0] // size
        blocks = self.blocks[first : first + count, None, ...]
        tiles = part.reshape((count, size, -1, size)).swapaxes(1, 2)
        return (tiles @ blocks + blocks).swapaxes(1, 2).reshape(part.shape)


class MissBat(Turned):
    """A block ``(r, r)`` for each r outputs changes every r columns of them."""

    name = "bat"
    words = "Bat (MiSS), blocks that multiply the base's inputs"
    fields = frozenset(("init_weights", "miss_dropout", "mini_r"))

    def fits(self, slots: Slots, enabled: tuple[bool, ...]) -> bool:
        """See :class:`Variant`."""
        return len(slots[BLOCK if BLOCK in slots else OLD].spec.shape) == 3

    def expected(self, slots: Slots) -> Mapping[str, str]:
        """See :class:`Variant`."""
        return {BLOCK if BLOCK in slots else OLD: "blocks rank rank"}

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        count, rank, _ = shapes[BLOCK if BLOCK in shapes else OLD]
        return Geometry(rank, count * rank, 0)

    def places(self, site: Site, shape: tuple[int, ...]) -> bool:
        """See :class:`Variant`."""
        is_tiled = len(shape) == 2 and shape[1] % site.geometry.rank == 0
        return is_tiled and super().places(site, shape)

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return site.geometry.rank

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        return Batted(values[BLOCK if BLOCK in values else OLD])


VARIANT = MissBat()
