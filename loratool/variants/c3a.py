"""C3A (arXiv 2407.19342): blocks of a weight that are circulant."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Variant

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["c3a_kernel"],
    "peft": {".c3a_kernel": "c3a_kernel"},
    "peft_types": ["C3A"],
    "evidence": 2,
    "priority": 10,
}

KERNEL: Final = Slot("c3a_kernel")


class Circulant(Change):
    """``Δ[p, q, i, j] = k[p, q, (j - i) mod b] / in``, blocks of ``b × b``."""

    def __init__(self, kernel: Array) -> None:
        self.kernel = kernel
        size = kernel.shape[2]
        self.grain = (size, size)

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        from loratool.math.dense_variants import circulant

        size = self.kernel.shape[2]
        first, left = row // size, column // size
        rows = slice(first, first + part.shape[0] // size)
        columns = slice(left, left + part.shape[1] // size)
        return circulant(self.kernel[rows, columns, :]) / (self.kernel.shape[1] * size)


class C3a(Variant):
    """A kernel ``(out / b, in / b, b)``: the first row of each block."""

    name = "c3a"
    words = "C3A, circulant blocks"
    shapes = MappingProxyType(
        {
            "c3a_kernel": ". . size",
        }
    )
    is_scaled = False
    has_change = True
    kernel_slots = frozenset()
    fields = frozenset(("block_size", "block_size_pattern", "init_weights"))

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        rows, columns, size = shapes[KERNEL]
        return Geometry(size, rows * size, columns * size)

    def places(self, site: Site, shape: tuple[int, ...]) -> bool:
        """See :class:`Variant`."""
        return len(shape) == 2 and super().places(site, shape)

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return site.geometry.rank

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (KERNEL,)

    def difference_shape(self, site: Site) -> tuple[int, ...]:
        """See :class:`Variant`."""
        return site.out_features, site.in_features

    def difference(self, values: Mapping[Slot, Array]) -> Array:
        """See :class:`Variant`."""
        from loratool.math.dense_variants import circulant

        kernel = values[KERNEL]
        return circulant(kernel) / (kernel.shape[1] * kernel.shape[2])

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        return Circulant(values[KERNEL])


VARIANT = C3a()
