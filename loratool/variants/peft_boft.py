"""BOFT (arXiv 2311.06243) as PEFT stores it: butterflies of rotations of inputs, and a scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.turned import Rowwise, Turned
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["boft_R"],
    "peft": {".boft_R": "boft_R", ".boft_s": "boft_s"},
    "peft_types": ["BOFT"],
    "evidence": 2,
    "priority": 10,
}

BLOCKS: Final = Slot("boft_R")
SCALES: Final = Slot("boft_s")


class PeftBoft(Turned):
    """``s ∘ (W R₁ᵀ … Rₘᵀ)``: each stage turns inputs from further apart."""

    name = "boft"
    words = "BOFT, butterfly rotations of the base's inputs"
    shapes = MappingProxyType(
        {
            "boft_R": "stages blocks size size",
            "boft_s": ". .",
        }
    )
    fields = frozenset(
        (
            "boft_block_size",
            "boft_block_num",
            "boft_n_butterfly_factor",
            "boft_dropout",
            "init_weights",
        )
    )

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        _, count, size, _ = shapes[BLOCKS]
        return Geometry(size, math.prod(shapes[SCALES]), count * size)

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        stages, count, size, _ = site.slots[BLOCKS].spec.shape
        if stages > 1 and (count % (1 << (stages - 1)) or size % 2):
            yield "LT003", f"has {stages} stages, which {count} blocks of {size} inputs do not have"

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        from loratool.math.rotations import butterfly_inputs, cayley

        stored, scales = values[BLOCKS], values[SCALES].reshape(-1)
        blocks = cayley((stored - stored.mT) / 2)

        def turned(rows: Array, first: int) -> Array:
            factors = scales[first : first + rows.shape[0]]
            return butterfly_inputs(rows, blocks) * factors[:, None]

        return Rowwise(turned)


VARIANT = PeftBoft()
