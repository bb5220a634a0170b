"""Plain A and B in place of what a file stores: exactly where that exists, else the best ones.

LoHa, LoKr, CP convolutions and VeRA are low-rank matrices written in another form. What rotates
or rescales the base's weight (OFT, BOFT, (IA)³, GLoRA, DoRA) needs that weight, and a rank; so do
whole differences, but no base.
"""

from __future__ import annotations

from dataclasses import replace

from loratool.adapter.leaving import leave_out, option, pattern_for
from loratool.adapter.model import Adapter
from loratool.adapter.part import Part
from loratool.adapter.problems import is_matrix
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
    where = f"{adapter.path}: {part.module}"
    if part.site is not None and not is_matrix(part.site):
        others = [site.label for site in adapter.sites if not is_matrix(site)]
        pattern = pattern_for(others, [site.label for site in adapter.sites])
        raise UnsupportedError(
            where,
            f"is {variant.words}, which no A and B express",
            hint=f"leave it out with {option('--drop', pattern)}, which the report says",
        )
    magnitude = part.stored(Slot.MAGNITUDE)
    if part.site is not None and magnitude is not None and not variant.has_factors:
        raise UnsupportedError(
            where,
            f"is {variant.words}, with magnitudes beside it, which nothing says how to apply",
            hint=leave_out(part.site, magnitude.spec.name),
        )
    if variant.has_factors and not variant.is_plain:
        lengths = part.values.get(Slot.MAGNITUDE)
        bare: dict[Slot, Expr] = {
            slot: v for slot, v in part.values.items() if slot is not Slot.MAGNITUDE
        }
        made = exactly(replace(part, values=bare), base)
        if lengths is None:
            return made
        values = {**made.values, Slot.MAGNITUDE: lengths}
        part = replace(made, values=values, variant=variant_named("dora"))
    return nearest(part, adapter, base, rank)
