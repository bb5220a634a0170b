"""Super-Tuning, as PEFT stores it: numbers at a few places of a weight, and a LoRA beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import number
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.sparse import AtPlaces, Sparse
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Slots
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["supertuning_values"],
    "peft": {
        ".supertuning_values": "supertuning_values",
        ".supertuning_indices": "supertuning_indices",
        ".supertuning_lora_A.weight": "supertuning_lora_A",
        ".supertuning_lora_B.weight": "supertuning_lora_B",
    },
    "peft_types": ["SUPERTUNING"],
    "evidence": 2,
    "priority": 10,
}

VALUES: Final = Slot("supertuning_values")
PLACES: Final = Slot("supertuning_indices")
DOWN, UP = Slot("supertuning_lora_A"), Slot("supertuning_lora_B")


class Both(AtPlaces):
    """The numbers, and ``scale · B @ A``."""

    def __init__(self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...]) -> None:
        from loratool.math.places import Places

        places = values[PLACES]
        rows, columns = places // shape[1], places % shape[1]
        super().__init__(site, Places(rows, columns, values[VALUES]), shape)
        self.down, self.up = values.get(DOWN), values.get(UP)
        self.scale = site.settings.get("alpha", 0.0) / site.geometry.rank

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        made = super().difference(part, row, column)
        if self.down is None or self.up is None:
            return made
        columns = slice(column, column + part.shape[1])
        return made + self.up[row : row + part.shape[0]] @ self.down[:, columns] * self.scale


class Supertuning(Sparse):
    """The places are told by their numbers in the flattened weight."""

    name = "supertuning"
    words = "Super-Tuning, numbers at a few places of the base's weight"
    shapes = MappingProxyType(
        {
            "supertuning_values": "n",
            "supertuning_indices": "n",
            "supertuning_lora_A": "rank in",
            "supertuning_lora_B": "out rank",
        }
    )
    spare = frozenset(("supertuning_lora_A", "supertuning_lora_B"))
    whole_numbers = frozenset(("supertuning_indices",))
    mending = (
        "where save_precomputed_indices was false, PEFT finds them in the base: load both there, "
        "merge_and_unload, and save the model"
    )
    fields = frozenset(
        ("sparsity", "select_top", "save_precomputed_indices", "lora_alpha", "lora_dropout")
    )

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return alpha."""
        return {} if config is None else {"alpha": number(config, "lora_alpha", 16, module)}

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        if DOWN not in shapes:
            return Geometry(shapes[VALUES][0], 0, 0)
        return Geometry(shapes[DOWN][0], shapes[UP][0], shapes[DOWN][1])

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        if (DOWN in site.slots) != (UP in site.slots):
            yield "LT001", "has A or B beside its numbers, but not the other"
        if DOWN in site.slots and not site.settings:
            yield "LT022", "has its lora_alpha in adapter_config.json, which is not there"

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return tuple(slot for slot in (VALUES, UP) if slot in slots)

    def places(self, site: Site, shape: tuple[int, ...]) -> bool:
        """See :class:`Variant`."""
        return len(shape) == 2 and super().places(site, shape)

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        return Both(site, values, shape)


VARIANT = Supertuning()
