"""DeLoRA (arXiv 2503.18225): ranks of unit length, a strength, and norms of the base's columns."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Geometry, Read, Settings, Shapes, Variant

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["delora_A"],
    "peft": {
        ".delora_A": "delora_A",
        ".delora_B": "delora_B",
        ".delora_lambda": "delora_lambda",
        ".delora_w_norm": "delora_w_norm",
    },
    "peft_types": ["DELORA"],
    "evidence": 2,
    "priority": 10,
}

PARTS: Final = tuple(Slot(f"delora_{name}") for name in ("A", "B", "lambda", "w_norm"))


class Delora(Variant):
    """``B diag(λ / r / (‖aᵢ‖ ‖bᵢ‖)) A diag(n)``: n is what the columns of W measured."""

    name = "delora"
    words = "DeLoRA, ranks of unit length"
    shapes = MappingProxyType(
        {
            "delora_A": "rank in",
            "delora_B": "out rank",
            "delora_lambda": "1",
            "delora_w_norm": "in",
        }
    )
    is_scaled = False
    has_factors = True
    fields = frozenset(("delora_lambda", "lambda_pattern", "init_weights", "module_dropout"))

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        down, up = shapes[PARTS[0]], shapes[PARTS[1]]
        return Geometry(down[0], up[0], down[1])

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (PARTS[2],)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import unit_ranks

        up, down = unit_ranks(*(read(site.slots[slot]) for slot in PARTS))
        return down, up


VARIANT = Delora()
