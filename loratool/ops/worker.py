"""What one thread does with the tensors of a run: block in, deltas, one rounding, block out."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from loratool.errors import MergeError
from loratool.ops.kernels import Kernel, compile_step
from loratool.ops.plan import Step
from loratool.ops.run import Run
from loratool.ops.tensors import Arithmetic, resolve_device

__all__ = ["Buffers", "check_finite", "compute_block", "work"]

MEASURED_BLOCKS: Final = 2
"""Blocks of each tensor, evenly spread, in which the surviving share of the update is measured."""


def work(run: Run) -> None:
    """Take blocks from ``run`` until there are none."""
    torch.set_num_threads(1)
    buffers = Buffers()
    device = resolve_device(run.device)
    for tensor, index in run.lanes.blocks(lambda step: compile_step(step, run.files, device)):
        if run.stopped:
            return
        kernel = tensor.kernel
        assert kernel is not None
        start = index * kernel.block_rows
        rows = min(kernel.block_rows, kernel.rows - start)
        data, kept, total = compute_block(
            kernel,
            tensor.step,
            start,
            rows,
            buffers,
            measure=_is_measured(kernel, index),
            allow_nonfinite=run.allow_nonfinite,
        )
        run.sink.write(tensor, start * kernel.width * kernel.output.itemsize, data)
        with run.lock:
            run.done += len(data)
            run.result.is_empty &= kernel.is_empty
            run.result.kept += kept
            run.result.total += total


def _stride(kernel: Kernel) -> int:
    return max(1, kernel.blocks // MEASURED_BLOCKS)


def _is_measured(kernel: Kernel, index: int) -> bool:
    return index % _stride(kernel) == 0


class Buffers:
    """Scratch memory of one thread, kept from block to block."""

    def __init__(self) -> None:
        self._input = bytearray()
        self._output = bytearray()
        self._block = torch.empty(0)

    def input(self, size: int) -> memoryview:
        if len(self._input) < size:
            self._input = bytearray(size)
        return memoryview(self._input)

    def output(self, size: int) -> memoryview:
        if len(self._output) < size:
            self._output = bytearray(size)
        return memoryview(self._output)[:size]

    def block(self, rows: int, width: int, kind: Arithmetic) -> Tensor:
        if self._block.numel() < rows * width or self._block.dtype != kind.dtype:
            self._block = torch.empty(rows * width, dtype=kind.dtype, device=kind.device)
        return self._block[: rows * width].view(rows, width)


def compute_block(
    kernel: Kernel,
    step: Step,
    start: int,
    rows: int,
    buffers: Buffers,
    *,
    measure: bool,
    allow_nonfinite: bool,
) -> tuple[memoryview, float, float]:
    """Return the bytes of some rows, and the two sums that measure what rounding kept."""
    count = rows * kernel.width
    source = kernel.reader.read(start, rows, buffers.input(count * kernel.reader.dtype.itemsize))
    block = buffers.block(rows, kernel.width, kernel.kind)
    block.copy_(source)
    measure = measure and step.has_delta
    original = block.clone() if measure or kernel.needs_original else block
    for delta in kernel.deltas:
        delta.apply(block, original, start)
    data = buffers.output(count * kernel.output.itemsize)
    result = torch.frombuffer(data, dtype=kernel.output, count=count).view_as(block)
    result.copy_(block)
    if not allow_nonfinite:
        check_finite(result, step, source)
    if not measure:
        return data, 0.0, 0.0
    change = block.sub_(original).flatten()
    kept = result.to(original).sub(original).flatten()
    scale = kernel.blocks / -(-kernel.blocks // _stride(kernel))
    return data, scale * float(kept.dot(change)), scale * float(change.dot(change))


def check_finite(result: Tensor, step: Step, source: Tensor) -> None:
    """Refuse a block with NaN or infinity in it, unless it is merely a converted one that had them.

    Both survive summation, which is the cheapest look at all elements there is. The sum of
    finite values may overflow too, so it only acquits.

    Raises:
        MergeError: The block is not finite.
    """
    if not result.is_floating_point() or bool(result.sum().isfinite()):
        return
    lost = result.isfinite().logical_not_()
    if not bool(lost.any()):
        return
    if not step.is_changed and torch.equal(lost, source.isfinite().logical_not_()):
        return  # only converted: what was infinite before (a mask, say) may stay so
    raise MergeError(
        step.spec.name,
        "the result is not finite (NaN or infinity in an input, or an overflow of "
        f"{str(result.dtype).removeprefix('torch.')})",
        hint="see 'loratool validate --deep'; --allow-nonfinite writes it all the same",
    )
