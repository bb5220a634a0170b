"""RoAd (arXiv 2409.00119): outputs that turn in pairs, and stretch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import chosen, whole
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.turned import Turned
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Slots
from loratool.errors import AdapterError
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["road_theta"],
    "peft": {".road_theta": "road_theta", ".road_alpha": "road_alpha"},
    "peft_types": ["ROAD"],
    "evidence": 2,
    "priority": 10,
}

ANGLES: Final = Slot("road_theta")
LENGTHS: Final = Slot("road_alpha")
HALVES: Final = {"road_1": 1, "road_2": 2, "road_4": 4}
"""How many angles two outputs have."""


class Paired(Change):
    """``c ∘ W + s ∘ W′``, where W′ has the two halves of each group of rows exchanged."""

    def __init__(self, cosines: Array, sines: Array, group: int) -> None:
        self.cosines = cosines
        self.sines = sines
        self.group = group
        self.grain = (group, 1)

    def changed(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        from loratool.math.rotations import turned_pairs

        rows = slice(row, row + part.shape[0])
        flat = part.reshape((part.shape[0], -1))
        turned = turned_pairs(flat, self.cosines[rows], self.sines[rows], self.group)
        return turned.reshape(part.shape)


class Road(Turned):
    """Two outputs, half a group apart, have one angle and length, or two, or four."""

    name = "road"
    words = "RoAd, rotations of pairs of the base's outputs"
    shapes = MappingProxyType(
        {
            "road_theta": "n",
            "road_alpha": "n",
        }
    )
    fields = frozenset(("variant", "group_size", "init_weights"))

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return how many angles there are, and how many outputs a group has."""
        if config is None:
            return {}
        group = whole(config, "group_size", 64, module)
        if group < 2 or group % 2:
            raise AdapterError(
                module, f"group_size is {group}, expected an even number", code="LT015"
            )
        return {
            "halves": HALVES[chosen(config, "variant", HALVES, "road_1", module)],
            "group": group,
        }

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        (count,) = shapes[ANGLES]
        return Geometry(1, count * 2 // settings.get("halves", 2), 0)

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        if not site.settings:
            yield (
                "LT022",
                "may turn its outputs in several ways: variant and group_size of "
                "adapter_config.json would tell",
            )
        elif site.out_features % site.settings["group"]:
            group = site.settings["group"]
            yield "LT003", f"has {site.out_features} outputs, no multiple of group_size {group}"

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return int(site.settings["group"])

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        return self._paired(site, values)

    def changes_bias(self, site: Site) -> bool:
        """See :class:`Variant`."""
        return True

    def bias_change(self, site: Site, values: Mapping[Slot, Array]) -> Change:
        """See :class:`Variant`."""
        return self._paired(site, values)

    def _paired(self, site: Site, values: Mapping[Slot, Array]) -> Change:
        from loratool.math.rotations import pair_factors

        group, halves = site.settings["group"], site.settings["halves"]
        both = pair_factors(values[ANGLES], values[LENGTHS], group, halves)
        return Paired(*both, group)


VARIANT = Road()
