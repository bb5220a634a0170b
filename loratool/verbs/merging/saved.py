"""Saved tensors whose module the base has cut otherwise: their rows go where they lie there."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from loratool.adapter.keys import transposed
from loratool.adapter.leaving import option, pattern_for
from loratool.adapter.model import Extra
from loratool.base.model import Model
from loratool.base.place import Place
from loratool.errors import BaseModelError, UnsupportedError
from loratool.files.spec import StoredTensor
from loratool.plan.model import Blend, SetRows
from loratool.verbs.merging.context import Share

__all__ = ["place_of_saved", "plan_cut"]

BIAS: Final = "bias"
SCALE: Final = "scale"
"""What Flux' own checkpoints call the weight of a norm."""


def place_of_saved(extra: Extra, base: Model) -> Place | None:
    """Return where the base has a saved parameter that is no tensor of it by itself.

    Raises:
        BaseModelError: Several modules could be meant.
        UnsupportedError: The base has its values in another order.
    """
    module, _, leaf = extra.name.rpartition(".")
    is_of_module = leaf in ("weight", SCALE, BIAS)
    place = base.find(module if is_of_module else extra.name) if module else None
    if place is None or place.pieces[0].name not in base.tensors:
        return None
    has_all = leaf != BIAS or all(base.holds(piece.bias) for piece in place.pieces)
    return place if has_all else None


def plan_cut(share: Share, extra: Extra, place: Place, base: Model) -> None:
    """Put the rows of a saved tensor where the base has them.

    Args:
        share: The adapter's part; filled in.
        extra: The tensor.
        place: Where its module's weight is.
        base: The base.

    Raises:
        BaseModelError: It has another shape.
        UnsupportedError: The base has its values in another order.
    """
    is_bias = extra.name.endswith(f".{BIAS}")
    shape = (place.experts, *place.shape) if place.experts > 1 else place.shape
    wanted = shape[:1] if is_bias else shape
    found = extra.tensor.spec.shape
    if place.is_transposed and place.is_whole and found == wanted and len(found) == 2:
        _put(share, place.pieces[0].name, None, transposed(extra.tensor), base)
        return
    is_stack = place.experts > 1
    if any(p.region.transposed or (p.region.exchanged and is_stack) for p in place.pieces):
        raise _uncut(share, extra, place)
    if found != wanted:
        raise BaseModelError(
            share.where(extra.name),
            f"has shape {list(found)}, the base's weight {list(wanted)}",
            hint="is this the base that the adapter was trained on?",
            code="LT022",
        )
    for piece in place.pieces:
        name = piece.bias if is_bias else piece.name
        region = piece.region
        count = region.rows * (region.experts if region.expert is None else 1)
        view = extra.tensor.rows(place.start(piece), count, 1 if is_bias else region.width)
        exchanged = region.bias_exchanged if is_bias else region.exchanged
        if view is not None and exchanged is not None:
            view = view.exchanging(exchanged)
        if view is None:
            raise _uncut(share, extra, place)
        rows = range(region.first_row, region.first_row + count)
        _put(
            share,
            name,
            None if len(rows) == _height(name, region.width, base) else rows,
            view,
            base,
        )


def _uncut(share: Share, extra: Extra, place: Place) -> UnsupportedError:
    pattern = pattern_for([extra.key], share.adapter.tensors)
    return UnsupportedError(
        share.where(extra.key),
        f"is saved whole, and {place.pieces[0].name!r} of the base has its values in another order",
        hint=f"leave it out with {option('--skip', pattern)}",
    )


def _height(name: str, width: int, base: Model) -> int:
    """Return how many rows a tensor of the base has, seen as a matrix of ``width`` columns."""
    elements = base.weight(name).spec.elements
    return elements if len(base.shape(name)) == 1 else elements // width


def _put(share: Share, name: str, rows: range | None, tensor: StoredTensor, base: Model) -> None:
    """Put a tensor in the place of the base's, or of some rows of it."""
    changes = share.changes[name]
    if rows is not None:
        changes.edits.append(SetRows(tuple(rows), tensor, share.weight))
        return
    shape = base.shape(name)
    if tensor.is_run:
        tensor = replace(tensor, spec=replace(tensor.spec, shape=shape))
    if share.weight != 1:
        changes.edits.insert(0, Blend(tensor, share.weight))
    else:
        changes.replacement = tensor
