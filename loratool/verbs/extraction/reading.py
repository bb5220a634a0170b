"""The difference of two stored weights, and what is known of it from the one pass that forms it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import numpy as np

from loratool.codecs import numbers
from loratool.codecs.numbers.scratch import Scratch
from loratool.codecs.weights import RowSource, Weight, rows_of
from loratool.files.inputs import InputFiles
from loratool.math.extraction import noise_floor, row_squares, spacing_squares, sum_of_squares
from loratool.math.precision import Precision
from loratool.values.rows import StoredRows
from loratool.verbs.extraction.pairs import Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loratool.math.namespace import Array

__all__ = [
    "PRECISIONS",
    "Change",
    "Differences",
    "HostDifferences",
    "change_of",
    "read_both",
    "subtract",
]

Result = TypeVar("Result")
BLOCK_ELEMENTS: Final = 1 << 19
"""Elements that are worked on at a time. Few of them fit into a cache, but many threads that do
little between two turns of the interpreter wait for it: twice as many from eight threads on."""
SAMPLED: Final = 8
"""One row of so many is asked how far apart the numbers of its dtype are there."""
PRECISIONS: Final = {
    "F64": Precision(2.0**-52, 2.0**-1022),
    "F32": Precision(2.0**-23, 2.0**-126),
    "F16": Precision(2.0**-10, 2.0**-14),
    "BF16": Precision(2.0**-7, 2.0**-126),
}


@dataclass(frozen=True, slots=True)
class Change:
    """What finetuning has done to a weight.

    Attributes:
        delta: ``(out, in)``: float32, or float64 where one of the two weights is.
        squared_norm: ``‖Δ‖_F²``; not finite where an element is not.
        floor: The largest singular value that the rounding of the finetuned weight leaves.
    """

    delta: Array
    squared_norm: float
    floor: float


class Differences(Protocol):
    """Where differences are formed, and so where they are decomposed."""

    @property
    def device(self) -> str:
        """What a report calls it."""
        ...

    @property
    def threads(self) -> int:
        """How many modules are in work at a time."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know of how it went."""
        ...

    def run(self, work: Callable[[Differences], Result]) -> Result:
        """Return what ``work`` makes of these differences, or of others if these do not fit."""
        ...

    def read(self, target: Target, expert: int, files: InputFiles) -> Change:
        """Return the change of a module, or of one of its experts."""
        ...


class HostDifferences:
    """Differences formed by the processor, a block at a time.

    The memory of one is used again for the next that the same thread reads.

    Args:
        threads: How many read at a time.
    """

    device = "cpu"
    notes: Sequence[str] = ()

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._local = threading.local()
        self._block = BLOCK_ELEMENTS * max(1, threads // 4)

    def run(self, work: Callable[[Differences], Result]) -> Result:
        """Return what ``work`` makes of these differences."""
        return work(self)

    def read(self, target: Target, expert: int, files: InputFiles) -> Change:
        """Return the change of a module, or of one of its experts."""
        scratch = self._scratch()
        rows, width, first = extent(target, expert)
        is_double = "F64" in (target.base.spec.dtype, target.tuned.spec.dtype)
        kind = np.float64 if is_double else np.float32
        base, tuned = (rows_of(stored, width, files) for stored in (target.base, target.tuned))
        precision = PRECISIONS[target.tuned.spec.dtype]
        delta = scratch.array("delta", (rows, width), kind)
        squares, spacings, sampled = [], [], 0
        step = max(1, self._block // width)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            block = delta[start : start + count]
            _read_into(block, tuned, first + start, scratch)
            sample = block[-start % SAMPLED :: SAMPLED]
            spacings.append(spacing_squares(sample, precision))
            sampled += len(sample)
            before = scratch.array("before", block.shape, kind)
            _read_into(before, base, first + start, scratch)
            with np.errstate(over="ignore", invalid="ignore"):
                np.subtract(block, before, out=block)
            norms = row_squares(block)
            if base.dtype != tuned.dtype or not np.isfinite(norms).all():
                after = scratch.array("after", block.shape, kind)
                _read_into(after, tuned, first + start, scratch)
                subtract(after, before, block, base.dtype, tuned.dtype)
                norms = row_squares(block)
            squares.append(norms)
        floor = noise_floor(math.fsum(spacings), sampled * width, (rows, width))
        # Summed exactly, so that how many threads there are makes no difference.
        total = sum_of_squares(np.concatenate(squares))
        return Change(delta.T if target.is_transposed else delta, total, floor)

    def _scratch(self) -> Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        found: Scratch = self._local.scratch
        return found


def read_both(target: Target, files: InputFiles) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the base's weight and the finetuned one, ``(out, in)``, as numbers of one dtype.

    What differs by a conversion of dtypes alone is the base's in both.
    """
    rows, width, _ = extent(target, 0)
    is_double = "F64" in (target.base.spec.dtype, target.tuned.spec.dtype)
    kind = np.float64 if is_double else np.float32
    both = [
        StoredRows(weight, width, files).rows(0, rows, kind)
        for weight in (target.base, target.tuned)
    ]
    change = np.empty_like(both[0])
    names = (target.base.spec.dtype, target.tuned.spec.dtype)
    subtract(both[1], both[0], change, *names)
    np.copyto(both[1], both[0], where=change == 0)
    before, after = (np.ascontiguousarray(one.T) if target.is_transposed else one for one in both)
    return before, after


def extent(target: Target, expert: int) -> tuple[int, int, int]:
    """Return rows and columns of a weight as it is stored, and the first row of an expert."""
    shape = target.tuned.spec.shape
    rows = shape[1] if target.is_parameter else shape[0]
    return rows, target.tuned.spec.elements // (rows * target.experts), expert * rows


def _read_into(values: NDArray[Any], source: RowSource, start: int, scratch: Scratch) -> None:
    """Read rows from ``start`` on as numbers into ``values``, as many as it has."""
    made = numbers.number(source.dtype)
    memory = scratch.array("bytes", (len(values) * source.row_bytes,), np.uint8).data
    codes = np.frombuffer(source.read(start, len(values), memory), made.code)
    made.decode_into(codes.reshape(values.shape), values, scratch)


def subtract(
    after: NDArray[Any], before: NDArray[Any], out: NDArray[Any], base: str, tuned: str
) -> None:
    """Write ``after - before``; zero where both are the same but for a conversion of dtypes.

    Infinities and NaN that are the same in both count as that too.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        np.subtract(after, before, out=out)
        if base == tuned and np.isfinite(out).all():
            return
        stored = numbers.decode(numbers.encode(before, tuned), tuned, before.shape, after.dtype)
        out[(stored == after) | (np.isnan(stored) & np.isnan(after))] = 0


def change_of(base: Weight, tuned: Weight, files: InputFiles) -> float:
    """Return ``‖tuned - base‖²`` of two tensors of one shape."""
    width = max(1, base.spec.shape[-1] if base.spec.shape else 1)
    rows = base.spec.elements // width
    one, other = (rows_of(weight, width, files) for weight in (base, tuned))
    parts = []
    step = max(1, BLOCK_ELEMENTS // width)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        stored = one.read(start, count), other.read(start, count)
        if one.dtype == other.dtype and np.array_equal(_words(stored[0]), _words(stored[1])):
            continue
        before, after = (
            numbers.decode(data, source.dtype, (count, width), np.float64)
            for data, source in zip(stored, (one, other), strict=True)
        )
        lost = np.empty_like(after)
        subtract(after, before, lost, one.dtype, other.dtype)
        parts.append(float(np.vdot(lost, lost)))
    return math.fsum(parts)


def _words(data: memoryview) -> NDArray[Any]:
    return np.frombuffer(data, np.uint64 if data.nbytes % 8 == 0 else np.uint8)
