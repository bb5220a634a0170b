"""Weights that are patched, block by block: the task of one.

What computes a block is loaded with the first of them, so that copying begins without numpy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loratool.codecs.weights import stored_tensors
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor
from loratool.plan.lanes import Spot, Unit
from loratool.plan.model import Step

if TYPE_CHECKING:
    from loratool.plan.kernels import Kernel
    from loratool.plan.run import Run

__all__ = ["Patch"]


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

    @property
    def effort(self) -> int:
        """The same."""
        return self.nbytes

    def reads(self) -> Iterable[StoredTensor]:
        """Return the weight as it is stored."""
        return stored_tensors(self.step.source)

    @property
    def written(self) -> Iterable[Spot]:
        """What it writes."""
        return (self.spot,)

    def prepare(self) -> None:
        """Load numpy, and the kernel."""
        import loratool.plan.block  # noqa: F401

    def take(self, run: Run) -> Unit | None:
        """Return the work on a block that nobody else does, or ``None`` if all are taken."""
        with self._lock:
            if self._is_taken:
                return None
            if self._kernel is None:
                self._kernel = self.compile(run)
            kernel, index = self._kernel, self._next_block
            if index == kernel.blocks:  # there may be none at all
                self._finish()
                return None
            self._next_block += 1
            if self._next_block == kernel.blocks:
                self._finish()
        return lambda: self.compute(run, kernel, index)

    def compile(self, run: Run) -> Kernel:
        """Return the arithmetic of the weight."""
        from loratool.plan.kernels import compile_step

        return compile_step(self.step, run.files, run.device, run.bench.products)

    def _finish(self) -> None:
        self._is_taken = True
        self._kernel = None

    def compute(self, run: Run, kernel: Kernel, index: int) -> None:
        """Compute one block and hand it over."""
        from loratool.plan.block import compute_block

        start = index * kernel.block_rows
        data, sums = compute_block(
            kernel,
            self.step,
            start,
            min(kernel.block_rows, kernel.rows - start),
            run.bench,
            measure=index % kernel.stride == 0,
            allow_nonfinite=run.allow_nonfinite,
        )
        row_bytes = DTYPES[kernel.output].size(kernel.width)
        run.sink.write(self.spot, start * row_bytes, data)
        run.count(len(data))
        run.note(*sums, is_empty=kernel.is_empty)
