"""Coded weights that are changed and written in their own codes again: the task of one."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loratool.codecs.codec import CodedTensor, Encoder
from loratool.codecs.numbers.number import are_finite
from loratool.codecs.parts import FileParts
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor
from loratool.plan.block import changed_block, not_finite
from loratool.plan.kernels import BLOCK_ELEMENTS, Kernel
from loratool.plan.lanes import Spot
from loratool.plan.model import Step
from loratool.plan.patches import Patch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loratool.codecs.numbers.number import Codes
    from loratool.plan.run import Run

__all__ = ["Recoding"]


class Recoding(Patch):
    """One coded weight: computed block by block like any other, then encoded with new scales.

    Args:
        step: How the weight comes about.
        weight: The weight as it is stored.
        spots: Where its parts go, by their roles: those that are written again.
    """

    def __init__(self, step: Step, weight: CodedTensor, spots: Mapping[str, Spot]) -> None:
        super().__init__(step, next(iter(spots.values())))
        self.weight = weight
        self.spots = spots
        self.encoder: Encoder = weight.codec.encoder(weight)
        self._largest = _Largest()
        self._grain = 1

    @property
    def nbytes(self) -> int:
        """Bytes of output."""
        return sum(spot.spec.nbytes for spot in self.spots.values())

    @property
    def effort(self) -> int:
        """Bytes of the numbers that are gone through."""
        return 2 * self.weight.spec.elements

    @property
    def written(self) -> Iterable[Spot]:
        """See :class:`Patch`."""
        return self.spots.values()

    def compile(self, run: Run) -> Kernel:
        """See :class:`Patch`; blocks begin where scales do."""
        kernel = super().compile(run)
        self._grain = kernel.grain
        width = max(1, kernel.width)
        grain = math.lcm(self.encoder.step * self.weight.width, width) // width
        return replace(kernel, grain=math.lcm(kernel.grain, grain))

    def compute(self, run: Run, kernel: Kernel, index: int) -> None:
        """See :class:`Patch`."""
        largest = None
        if self.encoder.needs_largest:
            largest = self._largest.of(lambda: self._find_largest(run, kernel))
        measure = index % kernel.stride == 0 and self.step.has_delta
        block, original = self._block(run, kernel, index, keep=measure)
        width = self.weight.width
        first = index * kernel.block_rows * kernel.width // width
        values = block.reshape(-1, width)
        made = self.encoder.encode(first, first + len(values), values, largest)
        done = 0
        for role, (row, codes) in made.items():
            spot = self.spots[role]
            data = np.ascontiguousarray(codes).reshape(-1).view(np.uint8).data
            row_bytes = len(data) // codes.shape[0] if codes.ndim else 0
            run.sink.write(spot, row * row_bytes, data)
            done += len(data)
        sums = (0.0, 0.0)
        if measure:
            sums = self._surviving(run, made, block, original, first)
            sums = (kernel.share * sums[0], kernel.share * sums[1])
        run.count(done)
        run.note(*sums, is_empty=kernel.is_empty)

    def _block(
        self, run: Run, kernel: Kernel, index: int, *, keep: bool
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Return a block, and where ``keep`` says so what it was, unless it is a large one.

        Where scales make a block large, as a whole expert is, it comes about in pieces, so that
        nothing else has its size.
        """
        start = index * kernel.block_rows
        rows = min(kernel.block_rows, kernel.rows - start)
        count = max(1, BLOCK_ELEMENTS // max(1, kernel.width) // self._grain) * self._grain
        if rows <= 2 * count:
            changed, before = changed_block(kernel, start, rows, run.bench, keep=keep)
            block, original = run.bench.given(changed), run.bench.given(before)
        else:
            block, original = np.empty((rows, kernel.width), _kind(kernel)), None
            for row in range(0, rows, count):
                some = min(count, rows - row)
                changed, _ = changed_block(kernel, start + row, some, run.bench, keep=False)
                block[row : row + some] = run.bench.given(changed)
        if not are_finite(block):
            source = kernel.reader.values(start, rows, is_double=kernel.is_double)
            is_before = source is not None and not np.isfinite(source).all()
            raise not_finite(self.step, is_before=is_before)
        return block, original

    def _find_largest(self, run: Run, kernel: Kernel) -> float:
        blocks = (self._block(run, kernel, n, keep=False)[0] for n in range(kernel.blocks))
        return max(float(np.abs(block).max(initial=0.0)) for block in blocks)

    def _surviving(
        self,
        run: Run,
        made: Mapping[str, tuple[int, Codes]],
        block: NDArray[Any],
        original: NDArray[Any] | None,
        first: int,
    ) -> tuple[float, float]:
        """Return ``⟨W' - W, Δ⟩`` and ``‖Δ‖²`` of a block that was encoded."""
        weight = self.weight
        files = FileParts(weight.parts, run.files)
        parts = _Encoded(weight, made, files)
        after = block.reshape(-1, weight.width)
        kept = total = 0.0
        # An expert may be one block, which is too large for several copies of it.
        count = max(1, BLOCK_ELEMENTS // max(1, weight.width))
        for row in range(0, len(after), count):
            rows = slice(row, min(row + count, len(after)))
            start, stop = first + rows.start, first + rows.stop
            stored = weight.codec.decode_rows(weight, start, stop, parts, block.dtype)
            if original is None:
                before = weight.codec.decode_rows(weight, start, stop, files, block.dtype)
            else:
                before = original.reshape(-1, weight.width)[rows]
            change = (after[rows] - before).reshape(-1)
            stored -= before
            kept += float(stored.reshape(-1).dot(change))
            total += float(change.dot(change))
        return kept, total


def _kind(kernel: Kernel) -> type[np.float32 | np.float64]:
    return np.float64 if kernel.is_double else np.float32


@dataclass
class _Largest:
    """The largest magnitude of a weight, found by whichever thread comes first."""

    value: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, find: Any) -> float:
        with self.lock:
            if self.value is None:
                self.value = find()
            return self.value


class _Encoded:
    """Parts of a weight of which some rows have just been encoded."""

    def __init__(
        self, weight: CodedTensor, made: Mapping[str, tuple[int, Codes]], others: FileParts
    ) -> None:
        self._made = {weight.parts[role]: rows for role, rows in made.items()}
        self._others = others

    def rows(self, part: StoredTensor, start: int, stop: int) -> memoryview:
        """Return the bytes of some rows."""
        if part not in self._made:
            return self._others.rows(part, start, stop)
        first, codes = self._made[part]
        cut = codes[start - first : stop - first] if codes.ndim else codes
        return np.ascontiguousarray(cut).reshape(-1).view(np.uint8).data

    def columns(
        self, part: StoredTensor, start: int, stop: int, rows: tuple[int, int] | None = None
    ) -> memoryview:
        """Return the bytes of some columns of some rows."""
        if part not in self._made:
            return self._others.columns(part, start, stop, rows)
        first, last = rows or (0, part.spec.shape[0])
        kind = DTYPES[part.spec.dtype]
        if kind.block is not None:  # rows of blocks, of all matrices of a stack
            width, height = part.spec.shape[-1], math.prod(part.spec.shape[1:-1])
            assert last == first + 1
            row = first * height + start // width
            return self.rows(part, row, row + (stop - start) // width)
        whole = np.frombuffer(self.rows(part, first, last), np.uint8).reshape(last - first, -1)
        cut = whole[:, kind.size(start) : kind.size(stop)]
        return np.ascontiguousarray(cut).reshape(-1).data
