"""A fused projection as the modules that it is made of.

Rows of B belong to one of them, so that a fused delta splits exactly: every part takes its rows
of B and all of A, or only its own ranks where B is block-diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

from loratool.adapter.part import Part
from loratool.adapter.problems import plain_options
from loratool.adapter.slots import Slot
from loratool.errors import UnsupportedError
from loratool.files.container import read_bytes
from loratool.names.family import Fusion
from loratool.values.expr import Expr, Placed, Stored, concatenated

__all__ = [
    "ROW_SLOTS",
    "check_magnitude",
    "check_splittable",
    "split_fused",
    "split_rows",
    "swapped",
]

ROW_SLOTS: Final = (Slot.UP_BIAS, Slot.BIAS, Slot.MAGNITUDE)
"""What else has one number for each output."""


def split_fused(part: Part, names: Sequence[str], fusion: Fusion) -> Iterator[Part]:
    """Yield the modules, called ``names``, that a fused projection is made of.

    What has no rows is not adapted and left out, unless nothing is trained yet.

    Raises:
        UnsupportedError: It is no plain LoRA, or its outputs cannot be shared among them.
    """
    check_splittable(part, "split")
    yield from split_rows(part, tuple(zip(names, _sizes(part, fusion), strict=True)))


def split_rows(part: Part, heights: Sequence[tuple[str, int]]) -> Iterator[Part]:
    """Yield the modules, each with its rows, that the outputs of a projection belong to.

    Raises:
        UnsupportedError: It is no plain LoRA, or has other rows.
    """
    check_splittable(part, "split")
    sizes = [size for _, size in heights]
    if sum(sizes) != part.up.shape[0]:
        raise UnsupportedError(
            part.module,
            f"has {part.up.shape[0]} outputs, and those that it is made of {sum(sizes)}",
        )
    ranks = _blocks(part, sizes)
    check_magnitude(part, "split")
    start = 0
    for index, (name, size) in enumerate(heights):
        up = part.up.rows(start, start + size)
        down, how = part.down, "split from a fused projection, sharing its A"
        others: dict[Slot, Expr] = {
            slot: value.rows(start, start + size)
            for slot, value in part.values.items()
            if slot in ROW_SLOTS
        }
        if ranks is not None:
            first, last = ranks[index]
            last = max(last, first + 1) if others else last
            if (first, last) != (0, part.rank):
                up, down = up.columns(first, last), part.down.rows(first, last)
                how = "split from a fused projection, with its own ranks"
        if ranks is None or first < last:
            made = part.factored(down, up, note=how, alpha=part.alpha if ranks is None else None)
            yield replace(made, module=name, values={**made.values, **others})
        start += size


def check_magnitude(part: Part, verb: str) -> None:
    """Refuse magnitudes of the inputs, which belong to the columns of the whole weight.

    Raises:
        UnsupportedError: It has such.
    """
    if part.has_input_magnitudes:
        raise UnsupportedError(
            part.module,
            f"has magnitudes of its inputs (LyCORIS, wd_on_out=False), and cannot be {verb}",
            hint="make it a plain LoRA with --to-lora --base BASE --rank R",
        )


def check_splittable(part: Part, verb: str) -> None:
    """Refuse what has no rows of B.

    Raises:
        UnsupportedError: It is no plain LoRA.
    """
    if not part.is_plain:
        raise UnsupportedError(
            part.module,
            f"is {part.variant.words}, and cannot be {verb} as a fused projection",
            hint=f"make it a plain LoRA with {plain_options(part.variant, part.values)}",
        )


def _sizes(part: Part, fusion: Fusion) -> tuple[int, ...]:
    """Return how many rows each part of a fused module has."""
    out, into = part.up.shape[0], part.down.shape[1]
    sizes = fusion.heights(into, out)
    if sizes is None:
        raise UnsupportedError(
            part.module, f"has {out} outputs, which {len(fusion.modules)} projections cannot share"
        )
    return sizes


def swapped(part: Part) -> Part:
    """Return a part with the halves of its outputs exchanged.

    Raises:
        UnsupportedError: It is no plain LoRA, or has no halves.
    """
    check_splittable(part, "exchanged")
    half, odd = divmod(part.up.shape[0], 2)
    if odd:
        raise UnsupportedError(
            part.module, f"has {part.up.shape[0]} outputs, and its halves are to be exchanged"
        )

    def exchange(value: Expr) -> Expr:
        return concatenated([value.rows(half, 2 * half), value.rows(0, half)])

    others: dict[Slot, Expr] = {
        slot: exchange(v)
        for slot, v in part.values.items()
        if slot in ROW_SLOTS and not (slot is Slot.MAGNITUDE and part.has_input_magnitudes)
    }
    made = part.factored(part.down, exchange(part.up), note="halves of its outputs exchanged")
    return replace(made, alpha=part.alpha, values={**made.values, **others})


def _blocks(part: Part, sizes: Sequence[int]) -> list[tuple[int, int]] | None:
    """Return which ranks each part of a block-diagonal B has; ``None`` where it is dense."""
    up = part.up
    if not isinstance(up, Stored | Placed) or len(sizes) == 1:
        return None
    nonzero = _support(up, sizes) if isinstance(up, Stored) else _placed(up, sizes)
    rank = up.shape[1]
    if not any(found for found in nonzero):
        return None  # untrained
    if rank % len(sizes) == 0:
        step = rank // len(sizes)
        even = [(i * step, (i + 1) * step) for i in range(len(sizes))]
        if all(
            first <= column < last
            for (first, last), found in zip(even, nonzero, strict=True)
            for column in found
        ):
            return [
                span if found else (span[0], span[0])
                for span, found in zip(even, nonzero, strict=True)
            ]
    spans = [(min(found), max(found) + 1) if found else None for found in nonzero]
    present = [span for span in spans if span is not None]
    if any(one[1] > other[0] for one, other in pairwise(present)):
        if len(present) == len(spans):
            return None
        # What has no rows is not adapted; the others share A.
        return [(0, rank) if span is not None else (0, 0) for span in spans]
    # Ranks between two supports are zero in all rows: they may go to either side.
    ends = [span[0] for span in present[1:]] + [rank]
    starts = [0, *ends[:-1]]
    filled = iter(zip(starts, ends, strict=True))
    return [next(filled) if span is not None else (0, 0) for span in spans]


def _placed(up: Placed, sizes: Sequence[int]) -> list[list[int]]:
    """Return the columns of a B that is laid out of blocks in the rows of each part."""
    found, start = [], 0
    for size in sizes:
        columns = {
            column
            for block, row, first in up.pieces
            if row < start + size and start < row + block.shape[0]
            for column in range(first, first + block.shape[1])
        }
        found.append(sorted(columns))
        start += size
    return found


def _support(up: Stored, sizes: Sequence[int]) -> list[list[int]]:
    """Return the columns of B that are not zero in the rows of each part."""
    import numpy as np

    width = up.tensor.spec.nbytes // max(1, up.tensor.spec.elements)
    kind = {2: "<u2", 4: "<u4", 8: "<u8"}[width]
    data = np.frombuffer(read_bytes(up.tensor), kind).reshape(up.shape[0], -1)
    data = data & np.array((1 << (8 * width - 1)) - 1, kind)  # -0.0 is zero too
    found, start = [], 0
    for size in sizes:
        used = data[start : start + size].any(axis=0)
        found.append([int(column) for column in np.flatnonzero(used)])
        start += size
    return found
