"""OFT (arXiv 2306.07280, 2506.19847) as PEFT has it since 0.15: rotations of blocks of inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import flag, number, whole
from loratool.adapter.model import Kind, Site
from loratool.adapter.slots import Slot
from loratool.adapter.turned import Rowwise, Turned
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Slots
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["oft_R", "oft_embedding_R"],
    "peft": {".oft_R.weight": "oft_R", ".oft_embedding_R.weight": "oft_embedding_R"},
    "peft_types": ["OFT"],
    "evidence": 2,
    "priority": 10,
}

BLOCKS: Final = Slot("oft_R")
OF_EMBEDDING: Final = Slot("oft_embedding_R")


class OfDimensions(Change):
    """``Rᵀ W`` in each block of rows: an embedding's vectors are multiplied from the other side."""

    def __init__(self, blocks: Array) -> None:
        self.blocks = blocks
        self.grain = (blocks.shape[1], 1)

    def changed(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        size = self.blocks.shape[1]
        first, count = row // size, part.shape[0] // size
        blocks = self.blocks if self.blocks.shape[0] == 1 else self.blocks[first : first + count]
        return (blocks.mT @ part.reshape((count, size, -1))).reshape(part.shape)


class PeftOft(Turned):
    """``W diag(R)ᵀ``: the upper triangle of each Q is stored, ``R = (I - Q)(I + Q)⁻¹`` or so."""

    name = "oft"
    words = "OFT, rotations of the base's inputs"
    embedding_slots = frozenset((OF_EMBEDDING,))
    fields = frozenset(
        (
            "oft_block_size",
            "module_dropout",
            "init_weights",
            "coft",
            "eps",
            "block_share",
            "use_cayley_neumann",
            "num_cayley_neumann_terms",
        )
    )

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return how rotations are made of what is stored."""
        if config is None:
            return {}
        has_series = flag(config, "use_cayley_neumann", True, module)
        terms = whole(config, "num_cayley_neumann_terms", 5, module)
        is_bounded = flag(config, "coft", False, module)
        return {
            "terms": terms if has_series else None,
            "limit": number(config, "eps", 6e-5, module) if is_bounded else None,
            "is shared": flag(config, "block_share", False, module),
        }

    def expected(self, slots: Slots) -> Mapping[str, str]:
        """See :class:`Variant`."""
        return {BLOCKS if BLOCKS in slots else OF_EMBEDDING: "blocks ."}

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        slot = BLOCKS if BLOCKS in shapes else OF_EMBEDDING
        count, elements = shapes[slot]
        size = _size(elements)
        sides = 0 if settings.get("is shared") else count * size
        return Geometry(size, *((0, sides) if slot is BLOCKS else (sides, 0)))

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        slot = BLOCKS if BLOCKS in site.slots else OF_EMBEDDING
        elements = site.slots[slot].spec.shape[1]
        size = _size(elements)
        if size * (size - 1) // 2 != elements:
            yield "LT003", f"has {elements} numbers in a block, which is no triangle of a matrix"
        if "terms" not in site.settings:
            yield (
                "LT022",
                "may make its rotations in several ways: use_cayley_neumann of "
                "adapter_config.json would tell",
            )

    def places(self, site: Site, shape: tuple[int, ...]) -> bool:
        """See :class:`Variant`."""
        size = site.geometry.rank
        side = shape[0] if site.kind is Kind.EMBEDDING else math.prod(shape[1:])
        return super().places(site, shape) and side % size == 0

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return site.geometry.rank if site.kind is Kind.EMBEDDING else 1

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        from loratool.math.rotations import (
            bounded,
            cayley,
            neumann,
            skew_from_triangle,
            turned_inputs,
        )

        triangles = values[BLOCKS if BLOCKS in values else OF_EMBEDDING]
        limit, terms = site.settings["limit"], site.settings["terms"]
        if limit is not None:
            triangles = bounded(triangles, limit)
        skew = skew_from_triangle(triangles, _size(triangles.shape[1]))
        blocks = cayley(skew) if terms is None else neumann(skew, terms)
        if site.kind is Kind.EMBEDDING:
            return OfDimensions(blocks)
        return Rowwise(lambda rows, _: turned_inputs(rows, blocks))


def _size(elements: int) -> int:
    """Return the side of a matrix with so many numbers above its diagonal."""
    return (1 + math.isqrt(1 + 8 * elements)) // 2


VARIANT = PeftOft()
