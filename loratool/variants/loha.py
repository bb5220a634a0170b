"""LoHa (arXiv 2108.06098, FedPara): a product of two deltas, element by element."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Change, Geometry, Read, Settings, Shapes, Variant
from loratool.errors import AdapterError

if TYPE_CHECKING:
    from loratool.math.exact_variants import Factors

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["hada_w1_a", "hada_w2_a"],
    "suffixes": {
        ".hada_w1_a": "hada_w1_a",
        ".hada_w1_b": "hada_w1_b",
        ".hada_w2_a": "hada_w2_a",
        ".hada_w2_b": "hada_w2_b",
        ".hada_t1": "hada_t1",
        ".hada_t2": "hada_t2",
    },
    "peft_types": ["LOHA"],
    "evidence": 2,
    "priority": 10,
}

W1_A: Final = Slot("hada_w1_a")
W1_B: Final = Slot("hada_w1_b")
CORE: Final = Slot("hada_t1")
PARTS: Final = (W1_A, W1_B, Slot("hada_w2_a"), Slot("hada_w2_b"), CORE, Slot("hada_t2"))


class Hadamard(Change):
    """``W + scale · (u1 @ v1) ∘ (u2 @ v2)``, as many rows and columns of it as are asked for."""

    def __init__(self, halves: tuple[Factors, Factors], scale: float) -> None:
        self.halves = halves
        self.scale = scale

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        kernel = math.prod(part.shape[2:])
        rows = slice(row, row + part.shape[0])
        columns = slice(column * kernel, (column + part.shape[1]) * kernel)
        one, other = (up[rows] @ down[:, columns] for up, down in self.halves)
        return (one * other * self.scale).reshape(part.shape)


class Loha(Variant):
    """``(w1_a @ w1_b) ∘ (w2_a @ w2_b)``, of rank ``r1 · r2`` at most."""

    name = "loha"
    words = "LoHa, a product of two deltas element by element"
    has_factors = True
    has_change = True
    kernel_slots = frozenset((CORE,))
    fields = frozenset(
        ("alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights")
    )

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        first, second = shapes[W1_A], shapes[W1_B]
        if CORE in shapes:  # cores (r, r, *kernel) between factors (r, out) and (r, in)
            kernel = math.prod(shapes[CORE][2:])
            return Geometry(second[0], first[1], second[1] * kernel)
        return Geometry(second[0], first[0], math.prod(second[1:]))

    def kernel(self, site: Site) -> tuple[int, ...] | None:
        """See :class:`Variant`."""
        core = site.slots.get(CORE)
        return core.spec.shape[2:] if core is not None else None

    def check(self, site: Site, shape: tuple[int, ...] | None) -> None:
        """See :class:`Variant`."""
        if not all(slot in site.slots for slot in PARTS[:4]):
            raise AdapterError(site.module, "lacks one of the four factors of a LoHa", code="LT001")
        if (CORE in site.slots) != (PARTS[-1] in site.slots):
            raise AdapterError(site.module, "lacks one of the two cores of a LoHa", code="LT001")

    def factor_rank(self, site: Site) -> int:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import hadamard_rank

        used = [site.slots[slot].spec.shape if slot in site.slots else None for slot in PARTS]
        return hadamard_rank(*used)  # type: ignore[arg-type]

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (W1_A,)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import hadamard_factors

        used = [read(site.slots[slot]) if slot in site.slots else None for slot in PARTS]
        up, down = hadamard_factors(*used)
        return down, up

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import hadamard_halves

        halves = hadamard_halves(*(values.get(slot) for slot in PARTS))
        return Hadamard(halves, scale)


VARIANT = Loha()
