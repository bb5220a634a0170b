"""Deltas in the form that a loader applies rightly: fused modules apart, one allowed rank."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from loratool.adapter.model import Adapter, Kind
from loratool.adapter.part import Part
from loratool.adapter.problems import plain_options
from loratool.adapter.slots import Slot
from loratool.base.model import Model
from loratool.errors import OptionError, UnsupportedError
from loratool.loaders.checks import listed, mending
from loratool.loaders.features import features_of
from loratool.loaders.loader import Fate, Fusion, Loader, Mend

__all__ = ["prepare", "refusals", "uniform_rank"]

ROW_SLOTS: Final[tuple[Slot, ...]] = (Slot.UP_BIAS, Slot.BIAS, Slot.MAGNITUDE)
"""What else has one number for each output."""


def prepare(parts: Sequence[Part], loader: Loader, base: Model | None) -> list[Part]:
    """Return ``parts`` with the modules apart that the loader wants apart.

    Each gets its rows of B as a view, and all of A. A module that the base itself has in one
    stays: loaders follow the base's names. Without a base, those are split whose sizes follow
    from their shape alone.

    Args:
        parts: The modules.
        loader: The loader.
        base: The base, whose shapes or ``config.json`` give the sizes.

    Raises:
        UnsupportedError: The sizes are not known, or it is no plain LoRA.
    """
    return [made for part in parts for made in _apart(part, loader, base)]


def uniform_rank(parts: Sequence[Part], loader: Loader) -> int | None:
    """Return the rank that all modules have to be filled up to; ``None`` if they have it.

    Where a loader is set up for certain ranks only, it is the next of these.

    Raises:
        UnsupportedError: A module has a higher rank than the loader accepts, or cannot be
            filled up.
    """
    ranks = {part.rank for part in parts if part.is_plain}
    if not ranks or not (loader.uniform_rank or loader.ranks):
        return None
    highest = max(ranks)
    wanted = loader.next_rank(highest)
    if wanted is None:
        name = next(part.module for part in parts if part.is_plain and part.rank == highest)
        raise UnsupportedError(
            name,
            f"has rank {highest}; {loader.title} accepts at most {loader.largest_rank}",
            hint=f"shrink it first: loratool truncate ADAPTER --rank {loader.largest_rank} -o OUT",
        )
    if ranks == {wanted}:
        return None
    for part in parts:
        if part.is_plain and part.rank != wanted and part.experts > 1:
            raise UnsupportedError(
                part.module,
                f"stacks {part.experts} experts of rank {part.rank}, which are not filled up "
                f"to rank {wanted}",
                hint="merge it into the base: loratool merge BASE ADAPTER -o OUT",
            )
    return wanted


def refusals(
    adapter: Adapter, loader: Loader, *, drop: Sequence[str] = (), to_lora: bool = False
) -> None:
    """Refuse what no conversion can make the loader apply.

    Args:
        adapter: What would be converted.
        loader: The loader.
        drop: Regular expressions of modules and tensors that are left out.
        to_lora: Whether every variant is written as plain LoRA.

    Raises:
        UnsupportedError: There is something of that kind.
        OptionError: A regular expression is none.
    """
    try:
        patterns = [re.compile(text) for text in drop]
    except re.error as error:
        raise OptionError("--drop", f"not a regular expression: {error}") from None
    for feature, found in features_of(adapter).items():
        rule = loader.rules.get(feature)
        if rule is None or rule.fate is Fate.NOTED or rule.mend is Mend.CONVERT:
            continue
        if to_lora and rule.mend in (Mend.TO_LORA, Mend.APPROXIMATE):
            continue
        names = [name for name in found.names if not any(p.search(name) for p in patterns)]
        if names:
            raise UnsupportedError(
                f"{adapter.path}: {names[0]}",
                f"has {feature.value}, in {listed(names)}: {rule.words}",
                hint=mending(rule.mend, loader),
            )


def _apart(part: Part, loader: Loader, base: Model | None) -> Iterator[Part]:
    parent, _, leaf = part.module.rpartition(".")
    fusion = loader.fusions.get(leaf)
    if fusion is None or part.parameter or ".experts" in part.module:
        yield part
        return
    place = base.find(part.module) if base is not None else None
    if place is not None and len(place.pieces) == 1:
        yield replace(part, notes=(*part.notes, "stays in one, as the base has it"))
        return
    if not part.is_plain or part.kind is not Kind.LINEAR:
        raise UnsupportedError(
            part.module,
            f"is {part.variant.words}, and cannot be split into {', '.join(fusion.parts)}",
            hint=f"make it a plain LoRA with {plain_options(part.variant, part.values)}",
        )
    names = [f"{parent}.{name}" if parent else name for name in fusion.parts]
    start = 0
    for name, size in zip(names, _sizes(part, fusion, names, base), strict=True):
        stop = start + size
        made = part.factored(
            part.down,
            part.up.rows(start, stop),
            alpha=part.alpha,
            note=f"split from {leaf}, sharing its A",
        )
        others = {s: v.rows(start, stop) for s, v in part.values.items() if s in ROW_SLOTS}
        yield replace(made, module=name, values={**made.values, **others})
        start = stop


def _sizes(part: Part, fusion: Fusion, names: Sequence[str], base: Model | None) -> list[int]:
    """Return how many rows of B each projection has.

    Raises:
        UnsupportedError: They are not known, or do not add up.
    """
    out, count = part.up.shape[0], len(names)
    sizes: list[int] | None
    if base is not None:
        places = [base.find(name) for name in names]
        stored = [place.shape[0] for place in places if place is not None]
        heads = base.config.projection_rows
        told = list(heads) if fusion.heads and heads else None
        sizes = stored if len(stored) == count else told
        if sizes is None and fusion.heads:
            raise UnsupportedError(
                part.module,
                f"is {', '.join(fusion.parts)} in one, and the base tells no sizes",
                hint="give --base as a folder with config.json",
            )
    elif fusion.heads:
        # Groups of queries could share keys: then the parts differ, and only the base tells.
        sizes = [out // count] * count if out == count * part.down.shape[1] else None
        if sizes is None:
            raise UnsupportedError(
                part.module,
                f"is {', '.join(fusion.parts)} in one, with {out} outputs of sizes that its shape "
                "does not tell",
                hint="give --base, a folder with config.json",
            )
    else:
        sizes = None
    if sizes is None:
        sizes = [out // count] * count
    if sum(sizes) != out or min(sizes) <= 0:
        raise UnsupportedError(
            part.module,
            f"has {out} outputs, but {', '.join(fusion.parts)} have {', '.join(map(str, sizes))}",
            hint="is this the base that it was trained on?" if base is not None else None,
        )
    return sizes
