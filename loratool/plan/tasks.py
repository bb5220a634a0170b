"""What is computed for an adapter: modules as a whole, single tensors, reports."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from loratool.errors import AdapterError
from loratool.files.container import read_view
from loratool.plan.adapter import ModuleOutput, Output
from loratool.plan.lanes import Spot, Unit
from loratool.plan.module_error import Outcome, computed
from loratool.values.arrays import Rounded
from loratool.values.expr import Mean, Together

if TYPE_CHECKING:
    from loratool.plan.run import Run

__all__ = ["ModuleTask", "OutputTask", "ReportTask"]


class _Whole:
    """A task of one unit."""

    def __init__(self) -> None:
        self._is_free = threading.Lock()

    def take(self, run: Run) -> Unit | None:
        """Return the work, once."""
        return (lambda: self.do(run)) if self._is_free.acquire(blocking=False) else None

    def do(self, run: Run) -> None:
        """Do all of it."""
        raise NotImplementedError


class ModuleTask(_Whole):
    """A module of an adapter, all of whose tensors are computed together.

    Args:
        item: The module.
        spots: Where tensors go, by name.
        outcome: Where its error is noted.
    """

    def __init__(self, item: ModuleOutput, spots: Mapping[str, Spot], outcome: Outcome) -> None:
        super().__init__()
        self.item = item
        self.spots = spots
        self.outcome = outcome
        self.nbytes = sum(
            output.spec.nbytes
            for _, output in item.outputs()
            if output.moved is None or output.moved.strides is not None
        )
        self.effort = max(self.nbytes, sum(each.nbytes for each in item.togethers))

    def do(self, run: Run) -> None:
        made = computed(self.item, self.outcome)
        for slot, output in self.item.outputs():
            is_copied = output.moved is not None and output.moved.strides is None
            if slot in made or not is_copied:
                _write(run, output, self.spots[output.spec.name], made.get(slot))
        run.count(self.nbytes)


class OutputTask(_Whole):
    """A tensor by itself."""

    def __init__(self, output: Output, spot: Spot) -> None:
        super().__init__()
        self.output = output
        self.spot = spot
        self.nbytes = self.effort = output.spec.nbytes

    def do(self, run: Run) -> None:
        made = None
        if self.output.moved is None:
            values = self.output.value.evaluate()
            if isinstance(self.output.value, Mean) and not np.isfinite(values).all():
                raise AdapterError(self.spot.spec.name, "holds NaN or infinity in an adapter")
            made = Rounded.of(values, self.spot.spec.dtype)
            if not made.is_finite:
                raise AdapterError(
                    self.spot.spec.name,
                    f"does not fit into {self.spot.spec.dtype}",
                    hint="write a wider dtype with --dtype float32",
                )
        _write(run, self.output, self.spot, made)
        run.count(self.nbytes)


class ReportTask(_Whole):
    """Something that is computed for its report alone."""

    nbytes = 0

    def __init__(self, of: Together, outcome: Outcome) -> None:
        super().__init__()
        self.of = of
        self.effort = of.nbytes
        self.outcome = outcome

    def do(self, run: Run) -> None:
        self.outcome.reports[self.of.name] = self.of.compute()[1]


def _write(run: Run, output: Output, spot: Spot, made: Rounded | None) -> None:
    if not spot.spec.nbytes:
        return
    stored = output.moved
    if made is not None:
        run.sink.write(spot, 0, made.bits.data.cast("B"))
    elif stored is not None:
        run.sink.write(spot, 0, read_view(stored))
