"""MiSS (arXiv 2409.15371), once called Bone: one block of columns, added again and again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import (
    SHAPE,
    Array,
    Geometry,
    Read,
    Settings,
    Shapes,
    Slots,
    Variant,
)
from loratool.errors import UnsupportedError
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["miss_block", "bone_block"],
    "peft": {".miss_block": "miss_block", ".bone_block": "bone_block"},
    "peft_types": ["MISS", "BONE"],
    "evidence": 2,
    "priority": 10,
}

BLOCK: Final = Slot("miss_block")
OLD: Final = Slot("bone_block")


class Miss(Variant):
    """``Δ[o, i] = B[i mod r, o]``; a mini block is repeated over the outputs first."""

    name = "miss"
    words = "MiSS, a block that is repeated along the inputs"
    is_scaled = False
    has_factors = True
    needs_shape = True
    needs_places = True
    fields = frozenset(("init_weights", "miss_dropout", "mini_r"))

    def fits(self, slots: Slots, enabled: tuple[bool, ...]) -> bool:
        """See :class:`Variant`."""
        return len(_block(slots).spec.shape) == 2

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return whether the block is one of fewer outputs than the layer."""
        is_mini = config is not None and config.raw.get("init_weights") == "mini"
        return {"is mini": is_mini}

    def expected(self, slots: Slots) -> Mapping[str, str]:
        """See :class:`Variant`."""
        return {BLOCK if BLOCK in slots else OLD: "rank out"}

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        rank, out = shapes[BLOCK if BLOCK in shapes else OLD]
        rows, into = settings.get(SHAPE) or (0, 0)
        return Geometry(rank, rows if settings["is mini"] else out, into)

    def places(self, site: Site, shape: tuple[int, ...]) -> bool:
        """See :class:`Variant`."""
        columns = _block(site.slots).spec.shape[1]
        return len(shape) == 2 and super().places(site, shape) and shape[0] % columns == 0

    def check(self, site: Site, shape: tuple[int, ...] | None) -> None:
        """See :class:`Variant`."""
        if site.settings.get(SHAPE) is None:
            raise UnsupportedError(
                site.module,
                "is a MiSS: only the base tells how many inputs it has",
                hint="give --base BASE; headers are enough",
            )

    def width(self, site: Site, shape: tuple[int, ...] | None = None) -> int:
        """See :class:`Variant`."""
        return site.in_features

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return 1

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (BLOCK if BLOCK in slots else OLD,)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import repeated_block

        out, into = site.settings[SHAPE]
        up, down = repeated_block(read(_block(site.slots)), out, into)
        return down, up


def _block(slots: Slots) -> StoredTensor:
    return slots[BLOCK] if BLOCK in slots else slots[OLD]


VARIANT = Miss()
