"""The best plain LoRA of a rank for what no plain LoRA equals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from loratool.adapter.model import Adapter, Kind
from loratool.adapter.part import Part
from loratool.adapter.slots import Slot
from loratool.adapter.variant import WEIGHT
from loratool.base.model import Model
from loratool.base.place import Place
from loratool.base.values import read_place
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor
from loratool.math.extraction import leading_part
from loratool.math.randomness import generator_for
from loratool.plan.outcome import Approximated
from loratool.values.arrays import decode
from loratool.values.expr import Expr, Function, Result, computed_dtype, evaluated
from loratool.variants import variant_named

if TYPE_CHECKING:
    from loratool.values.expr import Array

__all__ = ["nearest"]


class Approximation:
    """Both factors of a dense delta, A and B, computed at once.

    Attributes:
        name: What it is, for people.
        tensors: What it is computed from.
        nbytes: Bytes of the dense delta.
    """

    def __init__(
        self,
        name: str,
        tensors: Sequence[StoredTensor],
        delta: Callable[[], Array],
        nbytes: int,
        rank: int,
        seed: int,
    ) -> None:
        self.name = name
        self.tensors = tuple(tensors)
        self.nbytes = nbytes
        self._delta = delta
        self._rank = rank
        self._seed = seed

    def compute(self) -> tuple[tuple[Array, ...], Approximated]:
        """Return A and B of the rank that was asked for, filled with zeros beyond their own."""
        delta = self._delta()
        delta = delta.reshape(delta.shape[0], -1)
        found = leading_part(delta, self._rank, generator_for(self._seed))
        factors = found.factors
        down, up = factors.down * factors.scale, factors.up
        missing = self._rank - down.shape[0]
        both = np.pad(down, ((0, missing), (0, 0))), np.pad(up, ((0, 0), (0, missing)))
        return both, Approximated(found.squared_norm, found.squared_residual)


def nearest(part: Part, adapter: Adapter, base: Model | None, rank: int | None) -> Part:
    """Return the best plain LoRA of ``rank``; how near it comes is told once it is computed.

    Raises:
        UnsupportedError: A base or a rank is missing, or there is no matrix to approximate.
    """
    where = f"{adapter.path}: {part.module}"
    variant = part.variant
    words = variant.words
    dense = variant.difference_shape(part.site) if part.site is not None else ()
    if not (variant.has_change or dense):
        raise UnsupportedError(
            where, f"is {words}: its delta depends on the base", hint=variant.remedy
        )
    if base is None and variant.needs_base:
        raise UnsupportedError(
            where,
            f"is {words}; its delta depends on the base's weight",
            hint="give --base BASE --rank R",
            code="LT022",
        )
    if rank is None:
        raise UnsupportedError(
            where, f"is {words}; a plain LoRA can only come near it", hint="give --rank R"
        )
    place = base.place(part.module) if base is not None and variant.needs_base else None
    shape = place.stored_shape if place is not None else dense
    if len(shape) < 2:
        raise UnsupportedError(where, f"has the shape {list(shape)}, which has no rank")
    kernel = shape[2:]
    most = min(rank, shape[0], math.prod(shape[1:]))
    assert part.site is not None
    used = [*part.site.tensors, *(place.tensors if place is not None else ())]
    is_embedding = part.kind is Kind.EMBEDDING
    is_turned = is_embedding
    if place is not None and base is not None and not is_embedding:
        is_turned = _is_turned(part, shape, base)
    _check_fit(part, shape[::-1] if is_turned else shape)
    made = Approximation(
        words,
        used,
        lambda: _dense(part, place, is_turned=is_turned),
        8 * math.prod(shape),
        most,
        seed=0,
    )
    dtype = _dtype(part)
    rows, width = (shape[1], shape[0]) if is_turned else (shape[0], shape[1])
    slots = part.slots if is_embedding else (Slot.DOWN, Slot.UP)
    down = Result(made, 0, (most, width, *kernel), dtype)
    ones = (1,) * len(kernel)
    up = Result(made, 1, (rows, most, *ones), dtype)
    others: dict[Slot, Expr] = {
        s: v for s, v in part.values.items() if s in (Slot.BIAS, Slot.UP_BIAS)
    }
    bias = _bias(part, place, base, dtype)
    if bias is not None:
        others[Slot.UP_BIAS] = bias
    elif Slot.UP_BIAS in others:
        others[Slot.UP_BIAS] = others[Slot.UP_BIAS].scaled(part.scale)
    return replace(
        part,
        values={slots[0]: down, slots[1]: up, **others},
        rank=most,
        scale=1.0,
        alpha=None,
        variant=variant_named("lora"),
        kind=Kind.EMBEDDING if is_embedding else Kind.CONV if kernel else Kind.LINEAR,
        notes=(*part.notes, f"{words}: the best plain LoRA of rank {most}"),
    )


def _bias(part: Part, place: Place | None, base: Model | None, dtype: str) -> Expr | None:
    """Return what is added to the layer's bias, where the variant changes that too."""
    site, variant = part.site, part.variant
    if site is None or place is None or base is None or not variant.changes_bias(site):
        return None
    (piece,) = place.pieces
    stored = base.tensors.get(piece.bias)
    if not isinstance(stored, StoredTensor):
        return None
    region = piece.region
    first = region.first_column if region.transposed else region.first_row

    def difference(bias: Array, *_: Array) -> tuple[Array, ...]:
        values = {slot: decode(tensor) for slot, tensor in site.slots.items()}
        if variant.bias_needs_weight:
            weight = read_place(place)
            values[WEIGHT] = weight.T if region.transposed else weight
        rows = region.ordered(bias[first : first + piece.outputs, None])
        return (np.asarray(variant.bias_change(site, values).difference(rows, 0, 0)),)

    used = (stored, *site.tensors, *(place.tensors if variant.bias_needs_weight else ()))
    made = Function("the change of its bias", used, difference)
    return Result(made, 0, (piece.outputs,), dtype)


def _check_fit(part: Part, shape: tuple[int, ...]) -> None:
    """Make sure that a module fits the base's weight.

    Args:
        part: The module.
        shape: That of the weight, ``(out, in, *kernel)``.

    Raises:
        AdapterError: It does not.
    """
    assert part.site is not None
    wanted = (shape[0], math.prod(shape[1:]))
    found = (part.site.out_features, part.site.in_features)
    if part.is_plain:
        found = (part.up.shape[0], math.prod(part.down.shape[1:]))
    fits = found == wanted if part.is_plain else part.variant.places(part.site, shape)
    if not fits:
        raise AdapterError(
            part.module,
            f"its delta has the shape {list(found)}, the base's weight {list(wanted)}",
            hint="is this the base that it was trained on?",
            code="LT022",
        )


def _is_turned(part: Part, shape: tuple[int, ...], base: Model) -> bool:
    """Whether the base stores the weight as ``(in, out)``, as GPT-2's Conv1D does."""
    site = part.site
    if len(shape) != 2 or site is None:
        return False
    is_as_stored = site.variant.places(site, shape)
    if is_as_stored == site.variant.places(site, shape[::-1]):
        return bool(base.is_conv1d(part.module))
    return not is_as_stored


def _dtype(part: Part) -> str:
    found = [v.dtype for v in part.values.values() if DTYPES[v.dtype].is_factor]
    return computed_dtype(found) if found else "F32"


def _dense(part: Part, place: Place | None, *, is_turned: bool) -> Array:
    """Return ΔW, ``(out, in, *kernel)`` in float64."""
    values = dict(zip(part.values, evaluated(list(part.values.values())), strict=True))
    if place is None:
        return np.asarray(part.variant.difference(values))
    assert part.site is not None
    alpha = part.stored(Slot.ALPHA)
    if alpha is not None:
        values[Slot.ALPHA] = decode(alpha)
    weight = read_place(place)
    if is_turned:
        weight = weight.T
    change = part.variant.change(part.site, values, weight.shape, part.scale)
    return np.asarray(change.difference(weight, 0, 0))
