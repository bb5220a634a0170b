"""From the modules of an adapter as they are stored to modules that can be written."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from loratool.adapter.model import Adapter, Site
from loratool.adapter.part import Part
from loratool.adapter.problems import check_sound
from loratool.adapter.slots import Slot
from loratool.errors import UnsupportedError
from loratool.schemes import scheme_named
from loratool.values.arrays import decode
from loratool.values.expr import Expr, Function, Placed, Result, Stored, computed_dtype
from loratool.variants import variant_named

if TYPE_CHECKING:
    from loratool.values.expr import Array

__all__ = ["parameter_of", "part_of"]


def part_of(site: Site, adapter: Adapter, width: int | None = None) -> Part:
    """Return a site of ``adapter`` as a part.

    Args:
        site: The site.
        adapter: Its adapter.
        width: Inputs of the base's layer, where the base is at hand.

    Raises:
        AdapterError: It is broken.
        UnsupportedError: What its delta is only the base can tell.
    """
    check_sound(site, adapter)
    values: dict[Slot, Expr] = {
        slot: Stored(tensor)
        for slot, tensor in site.slots.items()
        if slot is not Slot.ALPHA and slot not in site.variant.between
    }
    if Slot.MAGNITUDE in values:
        roles = scheme_named(adapter.scheme).roles
        values[Slot.MAGNITUDE] = roles.magnitude(site.slots[Slot.MAGNITUDE])
    scaling = site.scaling
    is_simple = not scaling.rank_stabilised and not scaling.epsilon and scaling.rank == site.rank
    part = Part(
        module=site.module,
        kind=site.kind,
        variant=site.variant,
        values=values,
        rank=site.rank,
        scale=scaling.factor,
        alpha=scaling.alpha if is_simple else None,
        site=site,
        nesting=site.nesting,
        experts=site.experts,
        parameter=parameter_of(site),
    )
    if site.variant.is_stacked:
        return _unstacked(part, site)
    if site.variant.is_its_own(site) or (site.variant.needs_shape and site.is_plain and width):
        return _expanded(part, site, width or site.variant.width(site))
    if site.variant.undetermined and not site.variant.has_change:
        needs = site.variant.needs_shape
        raise UnsupportedError(
            f"{adapter.path}: {site.label}",
            site.variant.undetermined.format(verb="convert"),
            hint="give --base" if needs else site.variant.remedy,
        )
    return part


def parameter_of(site: Site) -> str | None:
    """Return the raw parameter that a site adapts, as far as its configuration tells."""
    if not site.parameters:
        return None
    last = len(site.parameters) - 1
    return site.parameters[max(0, last - site.nesting)]


def _unstacked(part: Part, site: Site) -> Part:
    """Return stacked factors of a merged projection as one A and one B.

    loralib's ``MergedLinear`` multiplies each part of A with its own part of B; B beside zeros
    for the parts that are not enabled is the same.
    """
    enabled, up = site.enabled, part.up.reshaped(part.up.shape[:2])
    rank = up.shape[1]
    height = up.shape[0] // sum(enabled)
    pieces, done = [], 0
    for place, is_enabled in enumerate(enabled):
        if is_enabled:
            piece = up.rows(done * height, (done + 1) * height)
            pieces.append((piece, place * height, done * rank))
            done += 1
    whole = Placed(tuple(pieces), (len(enabled) * height, part.down.shape[0]), up.dtype)
    made = part.factored(part.down, whole, note="stacked factors laid out side by side")
    return replace(made, variant=variant_named("lora"))


def _expanded(part: Part, site: Site, width: int) -> Part:
    """Return the A and B that a variant with compact or divided factors stands for."""
    if not site.is_plain:
        return _factored(part, site, width)
    dtype = computed_dtype([part.down.dtype, part.up.dtype])

    def factors(*_: Array) -> tuple[Array, ...]:
        return site.variant.factors(site, decode, width)

    rank = part.down.shape[0]
    note = f"{site.variant.name} written out as plain factors"
    both = Function(note, site.tensors, factors)
    down = Result(both, 0, (rank, width), dtype)
    up = Result(both, 1, (part.up.shape[0], rank), dtype)
    return replace(part.factored(down, up, note=note), variant=variant_named("lora"))


def _factored(part: Part, site: Site, width: int) -> Part:
    """Return the A and B that factors under other roles stand for."""
    dtype = computed_dtype([stored.spec.dtype for stored in site.slots.values()])

    def factors(*_: Array) -> tuple[Array, ...]:
        return site.variant.factors(site, decode, width)

    rank = site.variant.factor_rank(site)
    note = f"{site.variant.name} written out as plain factors"
    both = Function(note, site.tensors, factors)
    down: Expr = Result(both, 0, (rank, width), dtype)
    up: Expr = Result(both, 1, (site.out_features, rank), dtype)
    kernel = site.variant.kernel(site)
    if kernel:
        down = down.reshaped((rank, width // math.prod(kernel), *kernel))
        up = up.reshaped((site.out_features, rank, *(1,) * len(kernel)))
    return replace(
        part,
        variant=variant_named("lora"),
        values={Slot.DOWN: down, Slot.UP: up},
        rank=rank,
        alpha=None,
        notes=(*part.notes, note),
    )
