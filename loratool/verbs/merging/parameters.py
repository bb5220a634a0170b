"""Whole parameters that an adapter adds to, or replaces: differences, norms, biases, modulation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from loratool.adapter.keys import transposed
from loratool.adapter.leaving import leave_out, option, pattern_for
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.base.fitting import Fit
from loratool.base.model import Model
from loratool.base.orientation import matrix_shape
from loratool.base.place import Place
from loratool.base.region import Region
from loratool.errors import BaseModelError, MissingModuleError
from loratool.files.spec import StoredTensor
from loratool.plan.model import AddTensor, Blend
from loratool.verbs.merging.context import Share

__all__ = ["add_bias", "plan_parameters"]

UNNAMED: Final = "head"
"""A module of original checkpoints whose own parameters are the model's in diffusers (Wan)."""


def plan_parameters(share: Share, site: Site, base: Model) -> Iterator[tuple[str, Region]]:
    """Add what a site of whole parameters changes to ``share``, and yield where that is.

    Args:
        share: The adapter's part; filled in.
        site: The site.
        base: The base.

    Raises:
        MissingModuleError: The base has no such parameter.
        BaseModelError: It has another shape.
    """
    for slot, leaves in {**site.variant.parameters, Slot.BIAS: ("bias",)}.items():
        tensor = site.slots.get(slot)
        if tensor is None:
            continue
        for fit, columns in _places(share, site, leaves, tensor, base):
            if site.variant.replaces:
                is_turned = fit.region.transposed
                _replace(share, site, fit, transposed(tensor) if is_turned else tensor, base)
            else:
                viewed = _as_matrix(tensor, columns)
                edit = AddTensor(viewed, share.weight, fit.region, fit.first)
                share.changes[fit.name].edits.append(edit)
            yield fit.name, fit.region


def add_bias(share: Share, place: Fit, tensor: StoredTensor, base: Model, factor: float) -> None:
    """Add a bias that comes beside the delta of a weight: to the same outputs of its layer's.

    Args:
        share: The adapter's part; filled in.
        place: Where the weight is.
        tensor: ``(out,)``.
        base: The base.
        factor: Its scale.

    Raises:
        BaseModelError: The base has no bias there, or another shape.
    """
    name, region = place.bias
    site = place.site
    key = tensor.spec.name
    if not base.holds(name):
        raise BaseModelError(
            share.where(site.label),
            f"trains a bias, but the base has no {name!r} to add it to",
            hint=f"merge without it: {_without_biases(share, key, base)}",
            code="LT022",
        )
    outputs = place.outputs or region.rows
    if tensor.spec.elements != outputs:
        raise BaseModelError(
            share.where(site.label),
            f"its bias has shape {list(tensor.spec.shape)}, the base's {[outputs]}",
            code="LT022",
        )
    edit = AddTensor(_as_matrix(tensor, 1), share.weight * factor, region, place.first)
    share.changes[name].edits.append(edit)


def _without_biases(share: Share, key: str, base: Model) -> str:
    """Return the hint to leave out this bias, and all others that have no place in the base."""
    keys = {key}
    for site in share.adapter.sites:
        own = [
            site.slots[slot].spec.name for slot in (Slot.UP_BIAS, Slot.BIAS) if slot in site.slots
        ]
        place = base.find(site.module, family=share.adapter.family) if own else None
        if place is not None:
            has_place = all(base.holds(piece.bias) for piece in place.pieces)
            keys |= set() if has_place else set(own)
    pattern = pattern_for(sorted(keys), share.adapter.tensors)
    return f"leave {'it' if len(keys) == 1 else 'them'} out with {option('--skip', pattern)}"


def _as_matrix(tensor: StoredTensor, columns: int) -> StoredTensor:
    """Return a tensor as a matrix of as many columns; its bytes lie where they are."""
    spec = tensor.spec
    if not tensor.is_run:
        return tensor
    return replace(tensor, spec=replace(spec, shape=(spec.elements // columns, columns)))


def _places(
    share: Share, site: Site, leaves: tuple[str, ...], tensor: StoredTensor, base: Model
) -> list[tuple[Fit, int]]:
    """Return where a stored tensor goes, and the columns of the matrix that it is there.

    Raises:
        MissingModuleError: The base has no such parameter.
        BaseModelError: It has another shape.
    """
    family = share.adapter.family
    shape = tensor.spec.shape
    place = base.find(site.module, family=family) if {"weight", "bias"} & set(leaves) else None
    if place is None and site.variant.replaces:  # ComfyUI names the parameter, not the module
        place = base.find(site.module.removesuffix(".scale"), family=family)
    if place is not None and not place.is_whole:
        return _pieces(share, site, place, tensor, base, is_bias="bias" in leaves)
    name = _named(site, leaves, place, base, family)
    if name is None:
        raise _missing(share, site, leaves, tensor, place, base)
    old = base.shape(name)
    is_turned = place is not None and "weight" in leaves and base.is_turned(place.module)
    if _squeezed(old[::-1] if is_turned else old) != _squeezed(shape) and not site.variant.replaces:
        raise _mismatch(share, site, shape, old)
    rows, columns = matrix_shape(old)
    region = place.pieces[0].region if place is not None and "weight" in leaves else None
    if region is not None and (region.rows, region.width) != (rows, columns):
        columns = region.width  # a stack of experts is seen as one matrix
        rows = math.prod(old) // columns
    if is_turned:
        return [(Fit(name, Region(rows, columns, transposed=True), site), rows)]
    return [(Fit(name, Region(rows, columns), site), columns)]


def _named(
    site: Site, leaves: tuple[str, ...], place: Place | None, base: Model, family: str | None
) -> str | None:
    """Return the tensor that a parameter of a module is, or that the module itself is."""
    for leaf in leaves:
        if place is not None and leaf == "weight":
            return place.pieces[0].name
        if place is not None and leaf == "bias":
            beside = place.pieces[0].bias
            return beside if beside in base.tensors else None
        found = base.parameter(site.module, leaf, family=family)
        if found is not None:
            return found
    parent, _, leaf = site.module.rpartition(".")
    if "weight" in leaves and parent:
        return base.parameter(parent, leaf, family=family)
    if leaf == UNNAMED:
        own = (name for each in leaves for name in (each, f"{parent}.{each}"))
        return next((name for name in own if name in base.tensors), None)
    return None


def _pieces(
    share: Share, site: Site, place: Place, tensor: StoredTensor, base: Model, *, is_bias: bool
) -> list[tuple[Fit, int]]:
    """Return where the rows of a tensor go whose module the base has cut otherwise.

    Raises:
        BaseModelError: It has another shape, or what it is added to is not there.
    """
    shape = tensor.spec.shape
    wanted = place.shape[:1] if is_bias else place.shape
    if _squeezed(shape) != _squeezed(wanted) or site.variant.replaces:
        raise _mismatch(share, site, shape, wanted)
    found = []
    for piece in place.pieces:
        fit = Fit(piece.name, piece.region, site, False, piece.first, place.shape[0])
        columns = math.prod(place.shape[1:])
        if is_bias:
            name, region = fit.bias
            if name not in base.tensors:
                raise _missing(share, site, ("bias",), tensor, place, base)
            fit, columns = replace(fit, name=name, region=region), 1
        found.append((fit, columns))
    return found


def _replace(share: Share, site: Site, fit: Fit, tensor: StoredTensor, base: Model) -> None:
    """Put a tensor in place of the base's, or move a share of the way to it."""
    old, shape = base.shape(fit.name), tensor.spec.shape
    if shape == old and share.weight != 1:
        share.changes[fit.name].edits.insert(0, Blend(tensor, share.weight))
        return
    if shape != old:
        if len(shape) != len(old) or share.weight != 1 or not site.variant.resizes:
            raise _mismatch(share, site, shape, old)
        share.notes.append(
            f"{fit.name!r} was replaced by a weight of another shape, {list(shape)} instead of "
            f"{list(old)}; the model has to be loaded with that"
        )
    share.changes[fit.name].replacement = tensor


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without sides of one: kernels of 1 × 1, and leading ones of tables."""
    return tuple(size for size in shape if size != 1)


def _mismatch(
    share: Share, site: Site, shape: tuple[int, ...], old: tuple[int, ...]
) -> BaseModelError:
    return BaseModelError(
        share.where(site.label),
        f"is {site.variant.words} of shape {list(shape)}, and the base has {list(old)}",
        hint="is this the base that the adapter was trained on?",
        code="LT022",
    )


def _missing(
    share: Share,
    site: Site,
    leaves: tuple[str, ...],
    tensor: StoredTensor,
    place: Place | None,
    base: Model,
) -> BaseModelError:
    key = tensor.spec.name
    if place is not None:
        return BaseModelError(
            share.where(key),
            f"the base's {place.module!r} has no {leaves[0]} that it could be added to",
            hint=leave_out(site, key),
            code="LT022",
        )
    nearest = base.nearest(site.module)
    words = f" (nearest: {', '.join(nearest)})" if nearest else ""
    return MissingModuleError(
        share.where(key),
        f"the base has no {' or '.join(leaves)} of {site.module!r}{words}",
        hint=leave_out(site, key),
    )
