"""One block of a weight: read, changed by every delta, rounded once."""

from __future__ import annotations

import numpy as np

from loratool.codecs import numbers
from loratool.errors import MergeError
from loratool.files.dtypes import DTYPES
from loratool.math.namespace import Array
from loratool.plan.blocks import Bench
from loratool.plan.kernels import Kernel
from loratool.plan.model import Step

__all__ = ["changed_block", "compute_block", "not_finite"]


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
    if kernel.is_move:
        size = rows * kernel.reader.row_bytes
        return kernel.reader.read(start, rows, bench.input(size)), (0.0, 0.0)
    measure = measure and step.has_delta
    block, original = changed_block(kernel, start, rows, bench, keep=measure)
    data, is_finite = bench.store(block, kernel.output)
    if not (is_finite or allow_nonfinite):
        source = kernel.reader.read(start, rows)
        _check_finite(data, step, source, kernel.reader.dtype)
    if not measure:
        return data, (0.0, 0.0)
    kept, total = bench.surviving(block, original, kernel.output)
    return data, (kernel.share * kept, kernel.share * total)


def changed_block(
    kernel: Kernel, start: int, rows: int, bench: Bench, *, keep: bool
) -> tuple[Array, Array]:
    """Return some rows with every delta applied, and as they were before where ``keep`` says so.

    Both are the bench's, and good until its next block.
    """
    shape = (rows, kernel.width)
    values = kernel.reader.values(start, rows, is_double=kernel.is_double)
    if values is None:
        source = kernel.reader.read(start, rows, bench.input(rows * kernel.reader.row_bytes))
        block = bench.load(source, kernel.reader.dtype, shape, is_double=kernel.is_double)
    else:
        block = bench.take(values)
    original = bench.kept(block) if keep or kernel.needs_original else block
    for delta in kernel.deltas:
        delta.apply(block, original, start, bench.products)
    return block, original


def _check_finite(data: memoryview, step: Step, source: memoryview, dtype: str) -> None:
    """Refuse a block with NaN or infinity in it, unless it is merely a converted one that had them.

    Raises:
        MergeError: The block is not finite.
    """
    after, before = (
        np.isfinite(numbers.decode(raw, kind, (raw.nbytes * 8 // DTYPES[kind].bits,)))
        for raw, kind in ((data, step.spec.dtype), (source, dtype))
    )
    if not step.is_changed and np.array_equal(after, before):
        return  # only converted: what was infinite before (a mask, say) may stay so
    raise not_finite(step, is_before=not before.all())


def not_finite(step: Step, *, is_before: bool) -> MergeError:
    """Return the error that a result is not finite, or was not before any change."""
    name = DTYPES[step.spec.dtype].torch_name
    if is_before:
        return MergeError(
            step.spec.name,
            "holds NaN or infinity in the base already",
            hint="--allow-nonfinite writes it all the same, as plain numbers",
        )
    return MergeError(
        step.spec.name,
        f"the result is not finite (NaN or infinity in an adapter, or an overflow of {name})",
        hint="see 'loratool validate --deep'; --allow-nonfinite writes it all the same",
    )
