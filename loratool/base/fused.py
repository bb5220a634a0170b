"""Projections that are several in one: rows of what the model has fused, or all of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratool.base.layout import Fused
from loratool.base.place import Piece, Place
from loratool.errors import BaseModelError
from loratool.names.family import stretches
from loratool.names.paths import fusions

if TYPE_CHECKING:
    from loratool.base.model import Model

__all__ = ["fused_place", "parts_apart"]


@dataclass(frozen=True, slots=True)
class Known:
    """A module that is others in another naming, output by output.

    Attributes:
        whole: Its name.
        parts: The others.
        heights: Returns how many outputs each of them has, given the inputs and all outputs.
        swapped: Whether the halves of its outputs are exchanged.
        paired: As of :class:`~loratool.base.layout.Fused`.
    """

    whole: str
    parts: tuple[str, ...]
    heights: Callable[[int, int], tuple[int, ...] | None]
    swapped: bool = False
    paired: tuple[int, ...] = ()


def fused_place(module: str, base: Model, family: str | None = None) -> Place | None:
    """Return the place of rows of a fused projection, or of one that is several here.

    The layout knows of such projections, or the family of diffusion models, whose original
    checkpoints fuse what diffusers has apart, or exchange the halves of its outputs.
    """
    known = _known(module, base, family)
    places = (_place_in(name, each, base, family) for name, each in known)
    found = next(filter(None, places), None)
    return replace(found, module=module) if found is not None else None


def parts_apart(module: str, base: Model) -> tuple[tuple[str, int], ...]:
    """Return the modules that a projection is in the model, each with its outputs.

    Empty where it is one there, or where their rows lie in another order than its own.
    """
    for fused in (base.live.fused(module), base.layout.fused(module, base.config)):
        if fused is None or fused.whole != module or any(fused.paired):
            continue
        places = [base.own_place(part) for part in fused.parts]
        found = [(place.module, place.shape[0]) for place in places if place is not None]
        if base.own_place(module) is None and len(found) == len(places):
            return tuple(found)
    return ()


def _known(module: str, base: Model, family: str | None) -> Iterator[tuple[str, Known]]:
    """Yield what ``module`` is or is a part of, each with what it goes by there."""
    for fused in (base.live.fused(module), base.layout.fused(module, base.config)):
        if fused is not None:
            yield module, _one_after_the_other(fused)
    for name, whole, fusion in fusions(module, family):
        yield name, Known(whole, fusion.modules, fusion.heights, fusion.swapped)


def _one_after_the_other(fused: Fused) -> Known:
    sizes = fused.sizes
    return Known(fused.whole, fused.parts, lambda _, total: sizes(total), paired=fused.paired)


def _place_in(module: str, known: Known, base: Model, family: str | None) -> Place | None:
    """Return the place of ``module``, which is all or a part of ``known``."""
    if module == known.whole:
        places = [_place_of_part(part, base, family) for part in known.parts]
        return _joined(known, [place for place in places if place])
    return _place_inside(module, known, base)


def _place_of_part(part: str, base: Model, family: str | None) -> Place | None:
    """Return the place of a part: a weight of its own, or rows of what fuses more than the whole.

    Flux.1 has the attention of a single block, which ComfyUI names, beside another layer in one.
    """
    own = base.own_place(part)
    if own is not None:
        return own
    known = ((name, each) for name, each in _known(part, base, family) if name != each.whole)
    return next(filter(None, (_place_inside(*each, base) for each in known)), None)


def _place_inside(module: str, known: Known, base: Model) -> Place | None:
    """Return the place of a part of ``known``, where the model has that."""
    whole = base.own_place(known.whole)
    if whole is None:
        return None
    outputs, inputs = whole.shape[:2]
    heights = known.heights(inputs, outputs)
    found = None if heights is None else stretches(heights, swapped=known.swapped)
    if found is None:
        raise BaseModelError(
            f"{base.path}: {known.whole}",
            f"has {outputs} rows, which are not those of {', '.join(known.parts)}",
            hint="is config.json that of this model?",
            code="LT022",
        )
    part = known.parts.index(module)
    pieces = [
        _rows(whole, each.native, each.count, each.first) for each in found if each.part == part
    ]
    if known.paired and (heads := known.paired[part]):
        pieces = [_exchanged(piece, (heads, 2, piece.outputs // heads // 2)) for piece in pieces]
    return _made_of(pieces, module, whole)


def _joined(known: Known, parts: Sequence[Place]) -> Place | None:
    """Return what ``parts`` are in one; ``None`` where some of them are missing."""
    if len(parts) != len(known.parts) or len({part.shape[1:] for part in parts}) != 1:
        return None
    found = stretches([part.shape[0] for part in parts], swapped=known.swapped)
    if found is None:
        return None
    pieces = []
    for each in sorted(found, key=lambda each: each.native):
        piece = _rows(parts[each.part], each.first, each.count, each.native)
        if known.paired and (heads := known.paired[each.part]):
            piece = _exchanged(piece, (heads, piece.outputs // heads // 2, 2))
        pieces.append(piece)
    return _made_of(pieces, known.whole, parts[0])


def _exchanged(piece: Piece, axes: tuple[int, int, int]) -> Piece:
    return replace(piece, region=replace(piece.region, exchanged=axes))


def _rows(place: Place, first: int, count: int, to: int) -> Piece:
    """Return ``count`` outputs of a module as those of another one, from its output ``to`` on."""
    (piece,) = place.pieces
    if count == place.shape[0]:
        return Piece(piece.name, piece.tensor, piece.region, to)
    return Piece(piece.name, piece.tensor, piece.region.outputs(first, count), to)


def _made_of(pieces: Sequence[Piece], module: str, like: Place) -> Place:
    count = sum(piece.outputs for piece in pieces)
    return Place(module, (count, *like.shape[1:]), like.dtype, tuple(pieces))
