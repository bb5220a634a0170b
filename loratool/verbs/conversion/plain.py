"""Plain A and B in place of what a file stores: exactly where that exists, else the best ones.

LoHa, LoKr, CP convolutions and VeRA are low-rank matrices written in another form. What rotates
or rescales the base's weight (OFT, BOFT, (IA)³, GLoRA, DoRA) needs that weight, and a rank; so do
whole differences, but no base.
"""

from __future__ import annotations

from dataclasses import replace

from loratool.adapter.model import Adapter
from loratool.adapter.part import Part
from loratool.adapter.slots import Slot
from loratool.base.model import Model
from loratool.errors import UnsupportedError
from loratool.values.expr import Expr
from loratool.variants import variant_named
from loratool.verbs.conversion.exact import exactly
from loratool.verbs.conversion.nearest import nearest

__all__ = ["to_plain"]


def to_plain(part: Part, adapter: Adapter, base: Model | None, rank: int | None) -> Part:
    """Return ``part`` with A and B: the same delta, or the nearest of a rank.

    Args:
        part: Any part.
        adapter: Where it comes from.
        base: The base, where one was given.
        rank: The rank of what has to be approximated.

    Raises:
        UnsupportedError: It needs a base or a rank, or has no matrix at all.
    """
    variant = part.variant
    if variant.is_plain and not variant.undetermined and part.is_plain:
        return part
    if not variant.has_matrix:
        raise UnsupportedError(
            f"{adapter.path}: {part.module}",
            f"is {variant.words}, which no A and B express",
            hint="leave it out with --drop, which says so in the report",
        )
    if variant.has_factors and not variant.is_plain:
        magnitude = part.values.get(Slot.MAGNITUDE)
        bare: dict[Slot, Expr] = {
            slot: v for slot, v in part.values.items() if slot is not Slot.MAGNITUDE
        }
        made = exactly(replace(part, values=bare), base)
        if magnitude is None:
            return made
        values = {**made.values, Slot.MAGNITUDE: magnitude}
        part = replace(made, values=values, variant=variant_named("dora"))
    return nearest(part, adapter, base, rank)
