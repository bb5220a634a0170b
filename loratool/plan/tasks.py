"""What is done for an adapter: modules computed as a whole, single tensors, reports."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loratool.errors import AdapterError
from loratool.files.container import read_view
from loratool.files.spec import StoredTensor
from loratool.files.transfer import read_into
from loratool.plan.adapter import AdapterPlan, ModuleOutput, Output
from loratool.plan.digests import WholeTask
from loratool.plan.lanes import Spot, Task
from loratool.plan.module_error import computed
from loratool.plan.outcome import Outcome
from loratool.plan.run import FileWork
from loratool.values.arrays import Rounded
from loratool.values.expr import Mean, Together

if TYPE_CHECKING:
    from loratool.plan.run import Run

__all__ = ["adapter_work"]


class ModuleTask(WholeTask):
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
            if output.moved is None or not output.moved.is_run
        )
        self.effort = max(self.nbytes, sum(each.nbytes for each in item.togethers))

    def do(self, run: Run) -> None:
        made = computed(self.item, self.outcome)
        for slot, output in self.item.outputs():
            is_copied = output.moved is not None and output.moved.is_run
            if slot in made or not is_copied:
                _write(run, output, self.spots[output.spec.name], made.get(slot))
        run.count(self.nbytes)


class OutputTask(WholeTask):
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


class ReportTask(WholeTask):
    """Something that is computed for its report alone."""

    nbytes = 0

    def __init__(self, of: Together, outcome: Outcome) -> None:
        super().__init__()
        self.of = of
        self.effort = of.nbytes
        self.outcome = outcome

    def do(self, run: Run) -> None:
        self.outcome.reports[self.of.name] = self.of.compute()[1]


def adapter_work(plan: AdapterPlan, outcome: Outcome) -> FileWork:
    """Return what is to be done for the weights file of an adapter."""
    places = plan.layout.offsets
    spots = {spec.name: Spot(spec, 0, places[spec.name]) for spec in plan.specs}
    moves: dict[str, StoredTensor] = {}
    tasks: list[Task] = []
    for item in plan.parts:
        outputs = [output for _, output in item.outputs()]
        if not item.is_moved:
            tasks.append(ModuleTask(item, spots, outcome))
        for output in outputs:
            if output.moved is not None and output.moved.is_run:
                moves[output.spec.name] = output.moved
            elif item.is_moved:
                tasks.append(OutputTask(output, spots[output.spec.name]))
        if item.alpha is not None:
            tasks.append(OutputTask(item.alpha, spots[item.alpha.spec.name]))
    for output in plan.carried:
        if output.moved is not None and output.moved.is_run:
            moves[output.spec.name] = output.moved
        else:
            tasks.append(OutputTask(output, spots[output.spec.name]))
    tasks += [ReportTask(each, outcome) for each in plan.measured]
    in_order = [(spots[spec.name], moves[spec.name]) for spec in plan.specs if spec.name in moves]
    seal = partial(_seal, plan, outcome.digests)
    return FileWork(plan.weights_name, plan.nbytes, b"", in_order, tasks, seal=seal)


def _write(run: Run, output: Output, spot: Spot, made: Rounded | None) -> None:
    if not spot.spec.nbytes:
        return
    stored = output.moved
    if made is not None:
        run.sink.write(spot, 0, made.bits.data.cast("B"))
    elif stored is not None:
        run.sink.write(spot, 0, read_view(stored))


def _seal(plan: AdapterPlan, digests: Mapping[Path, str], weights: Path) -> None:
    """Write what can be said only once all data is there: what surrounds it, hashes in it."""
    descriptor = os.open(weights, os.O_RDWR | os.O_CLOEXEC)
    try:
        sealed = _sealed(plan, descriptor, weights)
        plan.layout.seal(descriptor, plan.metadata_with(sealed, digests), path=weights)
    finally:
        os.close(descriptor)


def _sealed(plan: AdapterPlan, descriptor: int, path: Path) -> Mapping[str, str]:
    """Return the metadata that only the data tells, now that it is written."""
    if plan.seal is None:
        return {}
    size = plan.layout.size
    start = min(plan.layout.offsets.values(), default=size)

    def read(offset: int, into: memoryview) -> None:
        read_into(descriptor, into, start + offset, path=path)

    return plan.seal.close(read, size - start, plan.specs, plan.metadata)
