"""LoKr (LyCORIS; PEFT): a Kronecker product."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.model import Site
from loratool.adapter.scaling import Scaling
from loratool.adapter.slots import Slot
from loratool.adapter.variant import (
    Array,
    Change,
    Geometry,
    Read,
    Settings,
    Shapes,
    Slots,
    Variant,
)
from loratool.errors import AdapterError
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"],
    "suffixes": {
        ".lokr_w1": "lokr_w1",
        ".lokr_w1_a": "lokr_w1_a",
        ".lokr_w1_b": "lokr_w1_b",
        ".lokr_w2": "lokr_w2",
        ".lokr_w2_a": "lokr_w2_a",
        ".lokr_w2_b": "lokr_w2_b",
        ".lokr_t2": "lokr_t2",
    },
    "peft_types": ["LOKR"],
    "evidence": 2,
    "priority": 10,
}

W1, W1_A, W1_B = (Slot(name) for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b"))
W2, W2_A, W2_B = (Slot(name) for name in ("lokr_w2", "lokr_w2_a", "lokr_w2_b"))
CORE: Final = Slot("lokr_t2")
EXCHANGED: Final = "is exchanged"
"""In settings: whether it is ``w2 ⊗ w1`` at each place of the kernel."""
PARTS: Final = (W1, W1_A, W1_B, W2, W2_A, W2_B, CORE)


class Kronecker(Change):
    """``W + scale · w1 ⊗ w2``, as many rows and columns of it as are asked for."""

    def __init__(self, left: Array, right: Array, scale: float) -> None:
        self.left = left
        self.right = right
        self.scale = scale

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        from loratool.math.exact_variants import kronecker_part

        rows = range(row, row + part.shape[0])
        columns = range(column, column + part.shape[1])
        kernel = math.prod(part.shape[2:])
        found = kronecker_part(self.left, self.right, rows, columns, kernel)
        return (found * self.scale).reshape(part.shape)


class Exchanged(Change):
    """``W + scale · w2[…, k] ⊗ w1`` at each place k of the kernel."""

    def __init__(self, left: Array, right: Array, scale: float) -> None:
        self.left = left
        self.right = right
        self.scale = scale

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        from loratool.math.exact_variants import exchanged_part

        rows = range(row, row + part.shape[0])
        columns = range(column, column + part.shape[1])
        found = exchanged_part(self.left, self.right, rows, columns, math.prod(part.shape[2:]))
        return (found * self.scale).reshape(part.shape)


class Lokr(Variant):
    """``w1 ⊗ w2``, either of them whole or in factors.

    Of a one-dimensional convolution with a whole ``w2`` PEFT multiplies a matrix with an array of
    three axes, and aligns them at the last: what it trains is ``w2 ⊗ w1`` at each place.
    """

    name = "lokr"
    words = "LoKr, a Kronecker product"
    has_factors = True
    has_change = True
    kernel_slots = frozenset((CORE, W2))
    fields = frozenset(
        (
            "alpha",
            "decompose_both",
            "decompose_factor",
            "init_weights",
            "module_dropout",
            "rank_dropout",
            "rank_dropout_scale",
            "use_effective_conv2d",
        )
    )

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return whether PEFT exchanges its halves."""
        is_exchanged = config is not None and W2 in slots and len(slots[W2].spec.shape) == 3
        return {EXCHANGED: True} if is_exchanged else {}

    def is_its_own(self, site: Site) -> bool:
        """See :class:`Variant`."""
        return EXCHANGED in site.settings

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        if W1 in shapes:
            left, rank = shapes[W1], None
        else:
            left, rank = (shapes[W1_A][0], shapes[W1_B][1]), shapes[W1_B][0]
        if W2 in shapes:
            right = (shapes[W2][0], math.prod(shapes[W2][1:]))
        elif CORE in shapes:
            rank = shapes[CORE][0]
            kernel = math.prod(shapes[CORE][2:])
            right = (shapes[W2_A][1], shapes[W2_B][1] * kernel)
        else:
            rank = shapes[W2_B][0]
            right = (shapes[W2_A][0], math.prod(shapes[W2_B][1:]))
        whole = min(left) * min(right)
        return Geometry(rank or whole, left[0] * right[0], left[1] * right[1])

    def scaling(self, site: Site, config: LoraConfig | None) -> Scaling | None:
        """PEFT divides by the configured rank; LyCORIS ignores alpha where both are whole."""
        if config is None:
            return Scaling(None, site.rows) if {W1, W2} <= site.slots.keys() else None
        return None if Slot.ALPHA in site.slots else config.scaling_for(site.pattern_path)

    def scale_slot(self, slots: Mapping[Slot, Any]) -> Slot | None:
        """LyCORIS reads the product of two whole matrices without any scale."""
        return W1 if {W1, W2} <= slots.keys() else None

    def kernel(self, site: Site) -> tuple[int, ...] | None:
        """See :class:`Variant`."""
        if CORE in site.slots:
            return site.slots[CORE].spec.shape[2:]
        return site.slots[W2].spec.shape[2:] if W2 in site.slots else None

    def check(self, site: Site, shape: tuple[int, ...] | None) -> None:
        """See :class:`Variant`."""
        for whole, halves in ((W1, (W1_A, W1_B)), (W2, (W2_A, W2_B))):
            present = sum(slot in site.slots for slot in halves)
            if present != (0 if whole in site.slots else 2):
                raise AdapterError(
                    site.module, "lacks a factor of its LoKr, or has one too many", code="LT001"
                )
        if W2 in site.slots and CORE in site.slots:
            raise AdapterError(site.module, "has a core beside a whole half of its LoKr")

    def factor_rank(self, site: Site) -> int:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import kronecker_rank

        def shapes(whole: Slot, halves: tuple[Slot, Slot]) -> Any:
            found = [site.slots[slot].spec.shape for slot in _half(site.slots, whole, halves)]
            return found[0] if len(found) == 1 else tuple(found)

        core = site.slots[CORE].spec.shape if CORE in site.slots else None
        return kronecker_rank(shapes(W1, (W1_A, W1_B)), shapes(W2, (W2_A, W2_B)), core)

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (W1,) if W1 in slots else (W1_A,)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import exchanged_factors, kronecker_factors

        used = (slot for slot in PARTS if slot in site.slots)
        made = exchanged_factors if EXCHANGED in site.settings else kronecker_factors
        up, down = made(*_halves({s: read(site.slots[s]) for s in used}))
        return down, up

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import kronecker_halves

        made = Exchanged if EXCHANGED in site.settings else Kronecker
        return made(*kronecker_halves(*_halves(values)), scale)


def _halves(values: Mapping[Slot, Array]) -> tuple[Any, Any, Any]:
    """Return both sides of the product, whole or in factors, and the core of the second."""

    def half(whole: Slot, halves: tuple[Slot, Slot]) -> Any:
        return values[whole] if whole in values else tuple(values[slot] for slot in halves)

    return half(W1, (W1_A, W1_B)), half(W2, (W2_A, W2_B)), values.get(CORE)


def _half(slots: Slots, whole: Slot, halves: tuple[Slot, Slot]) -> tuple[Slot, ...]:
    """Return the roles that one side of the product has."""
    return (whole,) if whole in slots else halves


VARIANT = Lokr()
