"""Carry out the plan of an adapter: modules one by one, each at its place in the file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from loratool.adapter.config import CONFIG_NAME
from loratool.adapter.slots import Slot
from loratool.files.atomic import check_output, staged
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.files.transfer import copy_range, write_all
from loratool.ops.algebra.computing import Method, ModuleReport, compute, measure, transposed
from loratool.ops.algebra.extras import Carried
from loratool.ops.algebra.planning import AdapterPlan, ModuleJob
from loratool.ops.algebra.sidecars import write_sidecars
from loratool.ops.tensors import Arithmetic, read_tensor, resolve_device, torch_dtype

__all__ = ["Progress", "arithmetic", "in_parallel", "write_adapter"]

Progress = Callable[[int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_THREADS = 8
SYNC_BELOW = 64 << 20


def arithmetic(device: str) -> Arithmetic:
    """Return how algebra is computed: in float64, on the device that was asked for."""
    return Arithmetic(torch.float64, resolve_device(device))


def in_parallel(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    threads: int | None,
    progress: Progress | None = None,
    sizes: Sequence[int] | None = None,
) -> list[Result]:
    """Return ``work`` of every item, a few at a time, each on one thread.

    One thread for one item, so that results do not depend on how many there are.

    Args:
        work: What to do.
        items: With what.
        threads: How many at a time; by default one for each processor, at most eight.
        progress: Called with how much is done and how much there is.
        sizes: How much each item is; by default all are alike.
    """
    amounts = list(sizes) if sizes is not None else [1] * len(items)
    total = sum(amounts)
    stop = threading.Event()
    results: dict[int, Result] = {}
    done = 0

    def one(index: int) -> tuple[int, Result] | None:
        if stop.is_set():
            return None
        torch.set_num_threads(1)
        return index, work(items[index])

    count = threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
    before = torch.get_num_threads()
    with ThreadPoolExecutor(count) as pool:
        try:
            waiting = iter(range(len(items)))
            running: set[Future[tuple[int, Result] | None]] = {
                pool.submit(one, index) for index in islice(waiting, count)
            }
            while running:
                finished, running = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
                for future in finished:
                    found = future.result()
                    assert found is not None
                    results[found[0]] = found[1]
                    done += amounts[found[0]]
                    running |= {pool.submit(one, index) for index in islice(waiting, 1)}
                if progress is not None:
                    progress(done, total)
        finally:
            stop.set()
            torch.set_num_threads(before)
    return [results[index] for index in range(len(items))]


def write_adapter(
    plan: AdapterPlan,
    output: Path,
    *,
    inputs: Sequence[Path],
    method: Method | None = None,
    force: bool = False,
    device: str = "auto",
    threads: int | None = None,
    with_report: bool = True,
    progress: Progress | None = None,
) -> list[ModuleReport]:
    """Write ``plan`` at ``output``, whole or not at all, and report on every module.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    check_output(output, force=force, inputs=[*inputs, *plan.stamps], needed=plan.nbytes)
    is_small = plan.nbytes < SYNC_BELOW
    files = InputFiles(plan.stamps)
    try:
        for path in plan.stamps:
            files.descriptor(path)
        with staged(output, folder=plan.is_folder, force=force, sync=is_small) as place:
            weights = place / plan.weights_name if plan.is_folder else place
            descriptor = os.open(weights, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(descriptor, plan.nbytes)
                write_all(descriptor, memoryview(plan.header), 0)
                writer = _Writer(plan, descriptor, files, method or Method(), arithmetic(device))
                reports = writer.run(threads=threads, with_report=with_report, progress=progress)
                if is_small:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            files.check_unchanged()
            write_sidecars(plan.sidecars, place)
            if plan.config is not None:
                (place / CONFIG_NAME).write_bytes(plan.config_text)
    finally:
        files.close()
    return reports


class _Writer:
    """Writes tensors at their places in an open file."""

    def __init__(
        self,
        plan: AdapterPlan,
        descriptor: int,
        files: InputFiles,
        method: Method,
        kind: Arithmetic,
    ) -> None:
        self.plan = plan
        self.descriptor = descriptor
        self.files = files
        self.method = method
        self.kind = kind
        self.places = plan.offsets()
        self.twins: dict[str, ModuleJob] = {
            job.joint.twin_of: job
            for job in plan.jobs
            if job.route == "twin" and job.joint.twin_of is not None
        }

    def run(
        self, *, threads: int | None, with_report: bool, progress: Progress | None
    ) -> list[ModuleReport]:
        """Write everything."""
        for carried in self.plan.carried:
            self._carry(carried)
        jobs = [job for job in self.plan.jobs if job.route != "twin"]
        found = in_parallel(
            lambda job: self._module(job, with_report=with_report),
            jobs,
            threads=threads,
            progress=progress,
            sizes=[_size(job) for job in jobs],
        )
        return [report for reports in found for report in reports]

    def _module(self, job: ModuleJob, *, with_report: bool) -> list[ModuleReport]:
        if job.route == "copy":
            for slot, spec in job.specs.items():
                if slot is Slot.ALPHA:
                    self._write(spec, torch.tensor(job.output.alpha, dtype=torch.float32))
                else:
                    self._copy(spec, job.joint.terms[0].site.slots[slot])
            return [measure(job, self.kind)] if with_report else []
        tensors, report = compute(job, self.method, self.kind)
        for slot, tensor in tensors.items():
            self._write(job.specs[slot], tensor)
        reports = [report]
        twin = self.twins.get(job.joint.name)
        if twin is not None:
            for slot, tensor in transposed(twin, tensors).items():
                self._write(twin.specs[slot], tensor)
            reports.append(_scaled(report, twin))
        return reports

    def _carry(self, carried: Carried) -> None:
        if carried.constant is not None:
            self._write(carried.spec, torch.tensor(carried.constant, dtype=torch.float64))
            return
        if len(carried.sources) == 1 and not carried.rows and carried.factor == 1:
            self._copy(carried.spec, carried.sources[0])
            return
        values = [read_tensor(stored).double() * carried.factor for stored in carried.sources]
        if carried.rows:
            rows = [
                torch.stack([values[number][position] for number, position in places]).mean(dim=0)
                for places in carried.rows
            ]
            self._write(carried.spec, torch.stack(rows))
        else:
            self._write(carried.spec, torch.stack(values).mean(dim=0))

    def _copy(self, spec: TensorSpec, stored: StoredTensor) -> None:
        if stored.strides is not None or stored.spec.dtype != spec.dtype:
            self._write(spec, read_tensor(stored))
        elif spec.nbytes:
            copy_range(
                self.files.descriptor(stored.path),
                self.descriptor,
                stored.offset,
                self.places[spec.name],
                spec.nbytes,
                path=stored.path,
            )

    def _write(self, spec: TensorSpec, tensor: Tensor) -> None:
        values = tensor.detach().to("cpu", torch_dtype(spec.dtype)).reshape(spec.shape)
        data = memoryview(values.contiguous().flatten().view(torch.uint8).numpy().data)
        if data.nbytes:
            write_all(self.descriptor, data, self.places[spec.name])


def _size(job: ModuleJob) -> int:
    return sum(
        stored.spec.nbytes for term in job.joint.terms for stored in term.site.slots.values()
    )


def _scaled(report: ModuleReport, twin: ModuleJob) -> ModuleReport:
    """Return the report of a tied head: the embedding's, transposed and scaled."""
    scale = abs(twin.joint.twin_scale)
    return ModuleReport(
        twin.joint.name,
        report.rank,
        report.from_rank,
        report.squared_norm * scale**2,
        report.squared_error * scale**2,
        tuple(value * scale for value in report.singular_values),
        tuple(value * scale for value in report.discarded),
        report.cancelled,
    )
