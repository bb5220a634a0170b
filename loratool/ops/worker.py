"""What one thread does with the tensors of a run: block in, deltas, one rounding, block out."""

from __future__ import annotations

from typing import Final

import numpy as np

from loratool.codecs import numbers
from loratool.errors import MergeError
from loratool.files.dtypes import DTYPES
from loratool.ops.blocks import Bench, bench_on
from loratool.ops.kernels import Kernel, compile_step
from loratool.ops.plan import Step
from loratool.ops.run import Run
from loratool.plan.blas import single_threaded_blas

__all__ = ["compute_block", "work"]

MEASURED_BLOCKS: Final = 2
"""Blocks of each tensor, evenly spread, in which the surviving share of the update is measured."""


def work(run: Run) -> None:
    """Take blocks from ``run`` until there are none."""
    with single_threaded_blas(), np.errstate(all="ignore"):
        bench = bench_on(run.device)
        for tensor, index in run.lanes.blocks(
            lambda step: compile_step(step, run.files, run.device, bench.products)
        ):
            if run.stopped:
                return
            kernel = tensor.kernel
            assert kernel is not None
            start = index * kernel.block_rows
            rows = min(kernel.block_rows, kernel.rows - start)
            data, sums = compute_block(
                kernel,
                tensor.step,
                start,
                rows,
                bench,
                measure=_is_measured(kernel, index),
                allow_nonfinite=run.allow_nonfinite,
            )
            row_bytes = kernel.width * DTYPES[kernel.output].bits // 8
            run.sink.write(tensor, start * row_bytes, data)
            run.count(len(data))
            run.note(*sums, is_empty=kernel.is_empty)


def _stride(kernel: Kernel) -> int:
    return max(1, kernel.blocks // MEASURED_BLOCKS)


def _is_measured(kernel: Kernel, index: int) -> bool:
    return index % _stride(kernel) == 0


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
