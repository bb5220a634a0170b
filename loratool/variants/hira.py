"""HiRA: the base's weight times a low-rank matrix, element by element, added to itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.plain import matrix
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Slots, Variant

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["hira_A", "hira_embedding_A"],
    "peft": {
        ".hira_A": "hira_A",
        ".hira_B": "hira_B",
        ".hira_embedding_A": "hira_embedding_A",
        ".hira_embedding_B": "hira_embedding_B",
    },
    "peft_types": ["HIRA"],
    "evidence": 2,
    "priority": 10,
}

DOWN, UP = Slot("hira_A"), Slot("hira_B")
EMBEDDED: Final = Slot("hira_embedding_A"), Slot("hira_embedding_B")


class TimesLowRank(Change):
    """``W ∘ (1 + B A)``; of several such the factors are added, not multiplied."""

    of_original = True

    def __init__(self, up: Array, down: Array) -> None:
        self.up = up
        self.down = down

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        kernel = math.prod(part.shape[2:])
        columns = slice(column * kernel, (column + part.shape[1]) * kernel)
        made = self.up[row : row + part.shape[0]] @ self.down[:, columns]
        return part * made.reshape(part.shape)


class Hira(Variant):
    """A ``(r, in, *kernel)`` and B ``(out, r, 1, …)``, without any scale."""

    name = "hira"
    words = "HiRA, a low-rank matrix that multiplies the base's weight"
    is_scaled = False
    needs_base = True
    has_change = True
    kernel_slots = frozenset((DOWN,))
    embedding_slots = frozenset(EMBEDDED)
    fields = frozenset(("hira_dropout", "init_weights"))

    def expected(self, slots: Slots) -> Mapping[str, str]:
        """See :class:`Variant`."""
        down, up = (DOWN, UP) if DOWN in slots else EMBEDDED
        return {down: "rank in ...", up: "out rank ..."}

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        down, up = (DOWN, UP) if DOWN in shapes else EMBEDDED
        return Geometry(shapes[down][0], shapes[up][0], math.prod(shapes[down][1:]))

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return 1

    def followed(self, slots: Mapping[Slot, object]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (UP if UP in slots else EMBEDDED[1],)

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        down, up = (DOWN, UP) if DOWN in values else EMBEDDED
        return TimesLowRank(matrix(values[up]), matrix(values[down]))


VARIANT = Hira()
