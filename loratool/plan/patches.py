"""Weights that are patched: block in, deltas, one rounding, block out."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from loratool.codecs import numbers
from loratool.errors import MergeError
from loratool.files.dtypes import DTYPES
from loratool.plan.kernels import Kernel, compile_step
from loratool.plan.lanes import Spot, Unit
from loratool.plan.plan import Step

if TYPE_CHECKING:
    from loratool.plan.blocks import Bench
    from loratool.plan.run import Run

__all__ = ["Patch", "compute_block"]

MEASURED_BLOCKS: Final = 2
"""Blocks of each tensor, evenly spread, in which the surviving share of the update is measured."""


@dataclass
class Patch:
    """One weight to compute, block by block; its kernel is made by whichever thread comes first.

    Tasks are kept till the end of a run; the kernel, which holds factors, goes with the last block.

    Attributes:
        step: How it comes about.
        spot: Where it goes.
    """

    step: Step
    spot: Spot
    _kernel: Kernel | None = None
    _next_block: int = 0
    _is_taken: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        """Bytes of output."""
        return self.spot.spec.nbytes

    def take(self, run: Run) -> Unit | None:
        """Return the work on a block that nobody else does, or ``None`` if all are taken."""
        with self._lock:
            if self._is_taken:
                return None
            if self._kernel is None:
                products = run.bench.products
                self._kernel = compile_step(self.step, run.files, run.device, products)
            kernel, index = self._kernel, self._next_block
            if index == kernel.blocks:  # there may be none at all
                self._finish()
                return None
            self._next_block += 1
            if self._next_block == kernel.blocks:
                self._finish()
        return lambda: self._compute(run, kernel, index)

    def _finish(self) -> None:
        self._is_taken = True
        self._kernel = None

    def _compute(self, run: Run, kernel: Kernel, index: int) -> None:
        start = index * kernel.block_rows
        data, sums = compute_block(
            kernel,
            self.step,
            start,
            min(kernel.block_rows, kernel.rows - start),
            run.bench,
            measure=index % _stride(kernel) == 0,
            allow_nonfinite=run.allow_nonfinite,
        )
        row_bytes = kernel.width * DTYPES[kernel.output].bits // 8
        run.sink.write(self.spot, start * row_bytes, data)
        run.count(len(data))
        run.note(*sums, is_empty=kernel.is_empty)


def _stride(kernel: Kernel) -> int:
    return max(1, kernel.blocks // MEASURED_BLOCKS)


def compute_block(
    kernel: Kernel,
    step: Step,
    start: int,
    rows: int,
    bench: Bench,
    *,
    measure: bool,
    allow_nonfinite: bool,
) -> tuple[memoryview, tuple[float, float]]:
    """Return the bytes of some rows, and the two sums that measure what rounding kept.

    Raises:
        MergeError: A number in the result is not finite.
    """
    source = kernel.reader.read(start, rows, bench.input(rows * kernel.reader.row_bytes))
    if kernel.is_move:
        return source, (0.0, 0.0)
    shape = (rows, kernel.width)
    block = bench.load(source, kernel.reader.dtype, shape, is_double=kernel.is_double)
    measure = measure and step.has_delta
    original = bench.kept(block) if measure or kernel.needs_original else block
    for delta in kernel.deltas:
        delta.apply(block, original, start, bench.products)
    data, is_finite = bench.store(block, kernel.output)
    if not (is_finite or allow_nonfinite):
        _check_finite(data, step, source, kernel.reader.dtype)
    if not measure:
        return data, (0.0, 0.0)
    kept, total = bench.surviving(block, original, kernel.output)
    scale = kernel.blocks / -(-kernel.blocks // _stride(kernel))
    return data, (scale * kept, scale * total)


def _check_finite(data: memoryview, step: Step, source: memoryview, dtype: str) -> None:
    """Refuse a block with NaN or infinity in it, unless it is merely a converted one that had them.

    Raises:
        MergeError: The block is not finite.
    """
    if not step.is_changed:
        after, before = (
            np.isfinite(numbers.decode(raw, kind, (raw.nbytes * 8 // DTYPES[kind].bits,)))
            for raw, kind in ((data, step.spec.dtype), (source, dtype))
        )
        if np.array_equal(after, before):
            return  # only converted: what was infinite before (a mask, say) may stay so
    raise MergeError(
        step.spec.name,
        "the result is not finite (NaN or infinity in an input, or an overflow of "
        f"{DTYPES[step.spec.dtype].torch_name})",
        hint="see 'loratool validate --deep'; --allow-nonfinite writes it all the same",
    )
