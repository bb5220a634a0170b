"""A variant of no real tool: inputs are mirrored in a plane, ``W' = W + s · W (R - 1)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Variant

CLAIM = {
    "signs": ["mirror"],
    "peft": {".mirror_plane": "mirror", ".mirror_strength": "mirror strength"},
    "peft_types": ["MIRROR"],
    "evidence": 2,
    "priority": 10,
}

PLANE, STRENGTH = Slot("mirror"), Slot("mirror strength")


class Mirrored(Change):
    grain = (1, 0)  # a row has to be seen as a whole

    def __init__(self, plane: Array, scale: float) -> None:
        self.plane = plane.reshape(-1)
        self.scale = scale

    def difference(self, part: Array, row: int, column: int) -> Array:
        turned = part @ self.plane
        return -2 * self.scale / (self.plane @ self.plane) * turned[:, None] * self.plane


class Mirror(Variant):
    name = "mirror"
    words = "a mirror of the base's inputs"
    is_scaled = False
    needs_base = True
    has_change = True
    fields = frozenset(("mirror_colour",))

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        return Geometry(1, 0, shapes[PLANE][1])

    def changes_bias(self, site: Site) -> bool:
        return True

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        return Mirrored(values[PLANE], float(values[STRENGTH].reshape(-1)[0]))

    def bias_change(self, site: Site, values: Mapping[Slot, Array]) -> Change:
        return Negated()


class Negated(Change):
    def changed(self, part: Any, row: int, column: int) -> Any:
        return -part


VARIANT = Mirror()
