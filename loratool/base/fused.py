"""Projections that are several in one: rows of what the model has fused, or all of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.base.layout import Fused
from loratool.base.place import Piece, Place
from loratool.errors import BaseModelError
from loratool.names.paths import fusions

if TYPE_CHECKING:
    from loratool.base.model import Model

__all__ = ["fused_place"]


def fused_place(module: str, base: Model, family: str | None = None) -> Place | None:
    """Return the place of rows of a fused projection, or of one that is several here.

    The layout knows of such projections, or the family of diffusion models, whose original
    checkpoints fuse what diffusers has apart.
    """
    fused = base.layout.fused(module, base.config)
    known = [fused] if fused is not None else []
    known += [
        Fused(name, fusion.modules, are_inputs=fusion.sizes == "input")
        for name, fusion in fusions(module, family)
    ]
    return next(filter(None, (_place_in(each, module, base) for each in known)), None)


def _place_in(fused: Fused, module: str, base: Model) -> Place | None:
    """Return the place of ``module``, which is all or a part of ``fused``."""
    if module == fused.whole:
        places = [base.own_place(part) for part in fused.parts]
        return _joined(module, [place for place in places if place], len(places))
    whole = base.own_place(fused.whole)
    if whole is None:
        return None
    sizes = fused.sizes(*whole.shape[:2])
    if sizes is None:
        raise BaseModelError(
            f"{base.path}: {fused.whole}",
            f"has {whole.shape[0]} rows, which are not those of {', '.join(fused.parts)}",
            hint="is config.json that of this model?",
        )
    index = fused.parts.index(module)
    return _rows(module, whole, sum(sizes[:index]), sizes[index])


def _joined(module: str, parts: list[Place], count: int) -> Place | None:
    """Return what ``parts`` are in one; ``None`` where some of them are missing."""
    if not parts or len(parts) != count or len({part.shape[1:] for part in parts}) != 1:
        return None
    pieces: list[Piece] = []
    first = 0
    for part in parts:
        (piece,) = part.pieces
        pieces.append(Piece(piece.name, piece.tensor, piece.region, first))
        first += part.shape[0]
    return Place(module, (first, *parts[0].shape[1:]), parts[0].dtype, tuple(pieces))


def _rows(module: str, whole: Place, first: int, count: int) -> Place:
    """Return the place of ``count`` outputs of a fused projection."""
    (piece,) = whole.pieces
    return Place(
        module,
        (count, *whole.shape[1:]),
        whole.dtype,
        (Piece(piece.name, piece.tensor, piece.region.outputs(first, count)),),
    )
