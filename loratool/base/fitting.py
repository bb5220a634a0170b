"""Which tensors of a model an adapter's site changes, and where in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from loratool.adapter.model import Adapter, Site
from loratool.adapter.slots import Slot
from loratool.base.experts import locate_in_fused, locate_parameter
from loratool.base.model import Model
from loratool.base.orientation import mismatch, region_for
from loratool.base.place import Place
from loratool.base.region import Region
from loratool.errors import MissingModuleError, UnsupportedError
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor
from loratool.names.pipelines import component_of

__all__ = ["Fit", "fit"]

ROW_SLOTS: Final = (Slot.UP, Slot.UP_BIAS, Slot.MAGNITUDE)
"""The tensors of a site that have one row for each output."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One tensor that a site changes.

    Attributes:
        name: The tensor.
        region: Where in it the delta goes.
        site: The site, or the part of it whose outputs lie there.
        is_whole: Whether it is the weight of one module, the site's, and nothing else.
        is_cut: Whether the site has further outputs, elsewhere.
    """

    name: str
    region: Region
    site: Site
    is_whole: bool = True
    is_cut: bool = False


def fit(
    site: Site,
    adapter: Adapter,
    base: Model,
    assigned: Mapping[str, str],
    *,
    resized: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> list[Fit]:
    """Return the tensors of the base that ``site`` changes, and where in them.

    Args:
        site: A complete site.
        adapter: Its adapter.
        base: The base.
        assigned: Which parameter sites on raw parameters adapt, by their labels.
        resized: Shapes of tensors that the adapter replaces, by name.

    Raises:
        MissingModuleError: There is none; the nearest modules are told.
        BaseModelError: The shapes do not fit.
    """
    if site.label in assigned:
        found = locate_parameter(site, assigned[site.label], adapter, base)
        return [Fit(name, region, site, is_whole=False) for name, region in found]
    in_fused = None
    place = base.own_place(site.module, adapter.family)
    if place is None:
        in_fused = locate_in_fused(site, base)
    if in_fused is not None:
        return [Fit(*in_fused, site, is_whole=False)]
    place = place or base.find(site.module, family=adapter.family)
    if place is None:
        raise _missing(site, adapter, base)
    if not place.is_whole:
        return _cut(site, place)
    (piece,) = place.pieces
    shape = resized.get(piece.name) or piece.tensor.spec.shape
    is_flagged = bool(adapter.field("fan_in_fan_out"))
    return [
        Fit(piece.name, region_for(site, place.module, shape, base, is_flagged=is_flagged), site)
    ]


def _cut(site: Site, place: Place) -> list[Fit]:
    """Return the parts of a site whose module the base has cut otherwise.

    Raises:
        BaseModelError: The shapes do not fit.
        UnsupportedError: The site cannot be cut.
    """
    fits = site.variant.places(site, place.shape)
    if (site.out_features, site.in_features) != place.shape if site.is_plain else not fits:
        raise mismatch(site, place.shape, (site.out_features, site.in_features))
    is_mixed = any(piece.region.exchanged for piece in place.pieces)
    if is_mixed and not site.variant.has_factors:
        raise UnsupportedError(
            site.label,
            "changes the weight itself, and the base has its outputs in another order",
            hint="make it a plain LoRA: loratool convert ADAPTER --to-lora --base BASE --rank R",
        )
    if len(place.pieces) == 1:
        (piece,) = place.pieces
        return [Fit(piece.name, piece.region, site, is_whole=False)]
    if site.enabled or site.variant.is_blocked or site.nesting or not site.is_plain:
        raise UnsupportedError(
            site.label, f"the base has it in {len(place.pieces)} parts, into which it cannot be cut"
        )
    return [
        Fit(
            piece.name,
            piece.region,
            _rows_of(site, piece.first, piece.outputs),
            piece.is_whole,
            is_cut=True,
        )
        for piece in place.pieces
    ]


def _rows_of(site: Site, first: int, count: int) -> Site:
    """Return the part of a site that has ``count`` of its outputs, from ``first`` on."""
    cut = {slot: _rows(site.slots[slot], first, count) for slot in ROW_SLOTS if slot in site.slots}
    return replace(site, slots={**site.slots, **cut})


def _rows(stored: StoredTensor, first: int, count: int) -> StoredTensor:
    """Return some rows of a tensor, which lie where they are."""
    spec, strides = stored.spec, stored.strides
    row = strides[0] if strides is not None else spec.elements // max(1, spec.shape[0])
    offset = stored.offset + first * row * DTYPES[spec.dtype].bits // 8
    return replace(stored, spec=replace(spec, shape=(count, *spec.shape[1:])), offset=offset)


def _missing(site: Site, adapter: Adapter, base: Model) -> MissingModuleError:
    nearest = base.nearest(site.module)
    return MissingModuleError(
        f"{adapter.path}: {site.label}",
        "the base has no such module",
        hint=_without_component(site, adapter)
        or (f"nearest: {', '.join(nearest)}" if nearest else None),
    )


def _without_component(site: Site, adapter: Adapter) -> str | None:
    """Return how to leave out the component of a pipeline that ``site`` is in."""
    component, local = component_of(site.module, adapter.components)
    others = {component_of(other.module, adapter.components)[0] for other in adapter.sites}
    if component is None or len(others) < 2:
        return None
    key = next(iter(site.slots.values())).spec.name
    for inside in (local, local.replace(".", "_"), local.removeprefix("text_model.")):
        before = key.partition(inside)[0]
        if before and before != key:
            return f"leave out the {component} with --skip '^{re.escape(before)}'"
    return None
