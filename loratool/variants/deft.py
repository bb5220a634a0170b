"""DEFT, as PEFT stores it: a few directions of the outputs are taken out, and others put in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import chosen, flag, number
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Slots, Variant
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["deft_P"],
    "peft": {".deft_P": "deft_P", ".deft_R": "deft_R"},
    "peft_types": ["DEFT"],
    "evidence": 2,
    "priority": 10,
}

DIRECTIONS, INJECTED = Slot("deft_P"), Slot("deft_R")
METHODS: Final = ("relu", "qr")


class Exchanged(Change):
    """``W + Q (s R - Pᵀ W)``; of several such all look at the original weight."""

    grain = (0, 1)
    of_original = True

    def __init__(self, left: Array, right: Array, injected: Array | None) -> None:
        self.left = left
        self.right = right
        self.injected = injected

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        removed = self.right.mT @ part
        if self.injected is None:
            return -(self.left @ removed)
        return self.left @ (self.injected[:, column : column + part.shape[1]] - removed)


class Deft(Variant):
    """The directions are the columns of P; by ``para`` nothing is put in."""

    name = "deft"
    words = "DEFT, directions of the base's outputs that are exchanged"
    shapes = MappingProxyType({"deft_P": "out rank", "deft_R": "rank in"})
    spare = frozenset(("deft_R",))
    is_scaled = False
    needs_base = True
    has_change = True
    needs_whole = True
    fields = frozenset(("decomposition_method", "para", "alpha", "init_scale", "deft_dropout"))

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return how the directions are used."""
        if config is None:
            return {}
        rank = max(1, slots[DIRECTIONS].spec.shape[-1])
        alpha = number(config, "alpha", 0, module)
        return {
            "method": chosen(config, "decomposition_method", METHODS, "relu", module),
            "scale": alpha / rank if alpha else 1.0,
            "is removal": flag(config, "para", False, module),
        }

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        out, rank = shapes[DIRECTIONS]
        return Geometry(rank, out, shapes[INJECTED][1] if INJECTED in shapes else 0)

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        if not site.settings:
            yield (
                "LT022",
                "may use its directions in several ways: decomposition_method of "
                "adapter_config.json would tell",
            )
        elif site.settings["is removal"] == (INJECTED in site.slots):
            has = "" if INJECTED in site.slots else "no "
            yield "LT001", f"has {has}deft_R, and para is {site.settings['is removal']}"

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        from loratool.math.dense_variants import projector

        left, right = projector(values[DIRECTIONS], site.settings["method"] == "qr")
        injected = values.get(INJECTED)
        if injected is not None:
            injected = injected * site.settings["scale"]
        return Exchanged(left, right, injected)


VARIANT = Deft()
