"""SHiRA (arXiv 2406.13175): numbers that are added to a few places of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.sparse import AtPlaces, Sparse
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["shira_weight"],
    "peft": {".shira_weight": "shira_weight", ".shira_indices": "shira_indices"},
    "peft_types": ["SHIRA"],
    "evidence": 2,
    "priority": 10,
}

VALUES: Final = Slot("shira_weight")
PLACES: Final = Slot("shira_indices")


class Shira(Sparse):
    """Rows and columns of the places lie beside the numbers."""

    name = "shira"
    words = "SHiRA, numbers at a few places of the base's weight"
    shapes = MappingProxyType(
        {
            "shira_weight": "n",
            "shira_indices": "2 n",
        }
    )
    whole_numbers = frozenset(("shira_indices",))
    fields = frozenset(("init_weights", "mask_type", "random_seed"))

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        (count,) = shapes[VALUES]
        return Geometry(count, 0, 0)

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (VALUES,)

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        from loratool.math.places import Places

        rows, columns = values[PLACES]
        return AtPlaces(site, Places(rows, columns, values[VALUES]), shape)


VARIANT = Shira()
