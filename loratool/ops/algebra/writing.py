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
from loratool.errors import AdapterError
from loratool.files.atomic import check_output, staged
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.files.transfer import copy_range, write_all
from loratool.ops.algebra.computing import Method, ModuleReport, compute, measure, transposed
from loratool.ops.algebra.extras import Carried
from loratool.ops.algebra.plan import AdapterPlan, ModuleJob
from loratool.ops.algebra.sidecars import write_sidecars
from loratool.ops.tensors import Arithmetic, read_tensor, resolve_device, torch_dtype

__all__ = [
    "Progress",
    "TensorWriter",
    "arithmetic",
    "fill_adapter",
    "in_parallel",
    "is_synced",
    "write_adapter",
]

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
    progress: Progress | None = None,
) -> list[ModuleReport]:
    """Write ``plan`` at ``output``, whole or not at all, and report on every module.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    found: list[list[ModuleReport]] = []

    def fill(writer: TensorWriter) -> None:
        modules = _Modules(plan, writer, method or Method(), arithmetic(device))
        jobs = [job for job in plan.jobs if job.route != "twin"]
        found.extend(
            in_parallel(
                modules.write,
                jobs,
                threads=threads,
                progress=progress,
                sizes=[_size(job) for job in jobs],
            )
        )

    check_output(output, force=force, inputs=[*inputs, *plan.inputs()], needed=plan.nbytes)
    files = InputFiles(plan.stamps)
    try:
        with staged(output, folder=plan.is_folder, force=force, sync=is_synced(plan)) as place:
            fill_adapter(plan, place, files, fill)
    finally:
        files.close()
    return [report for reports in found for report in reports]


def is_synced(plan: AdapterPlan) -> bool:
    """Whether the output is small enough to wait for the disk."""
    return plan.nbytes < SYNC_BELOW


def fill_adapter(
    plan: AdapterPlan, place: Path, files: InputFiles, fill: Callable[[TensorWriter], None]
) -> None:
    """Write everything of ``plan`` to ``place``; ``fill`` writes the modules.

    Raises:
        LoratoolError: An input changed, or a module cannot be computed.
    """
    for path in plan.stamps:
        files.descriptor(path)
    weights = place / plan.weights_name if plan.is_folder else place
    descriptor = os.open(weights, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, plan.nbytes)
        write_all(descriptor, memoryview(plan.header), 0)
        writer = TensorWriter(plan, descriptor, files)
        for carried in plan.carried:
            writer.carry(carried)
        fill(writer)
        if is_synced(plan):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    files.check_unchanged()
    write_sidecars(plan.sidecars, place)
    if plan.config is not None:
        (place / CONFIG_NAME).write_bytes(plan.config_text)


class TensorWriter:
    """Writes tensors at their places in an open file.

    Args:
        plan: What is written.
        descriptor: The file, already as long as it will be.
        files: The inputs.
    """

    def __init__(self, plan: AdapterPlan, descriptor: int, files: InputFiles) -> None:
        self.descriptor = descriptor
        self.files = files
        self.places = plan.offsets()

    def write(self, spec: TensorSpec, tensor: Tensor) -> None:
        """Write ``tensor`` in the dtype and shape of ``spec``."""
        values = tensor.detach().to("cpu", torch_dtype(spec.dtype)).reshape(spec.shape)
        data = memoryview(values.contiguous().flatten().view(torch.uint8).numpy().data)
        if data.nbytes:
            write_all(self.descriptor, data, self.places[spec.name])

    def copy(self, spec: TensorSpec, stored: StoredTensor) -> None:
        """Write a stored tensor, byte for byte where dtype and layout allow."""
        if stored.strides is not None or stored.spec.dtype != spec.dtype:
            self.write(spec, read_tensor(stored))
        elif spec.nbytes:
            copy_range(
                self.files.descriptor(stored.path),
                self.descriptor,
                stored.offset,
                self.places[spec.name],
                spec.nbytes,
                path=stored.path,
            )

    def carry(self, carried: Carried) -> None:
        """Write a tensor that is no delta."""
        if carried.constant is not None:
            self.write(carried.spec, torch.tensor(carried.constant, dtype=torch.float64))
            return
        if len(carried.sources) == 1 and not carried.rows and carried.factor == 1:
            self.copy(carried.spec, carried.sources[0])
            return
        values = [read_tensor(stored).double() * carried.factor for stored in carried.sources]
        if len(values) > 1 and not all(bool(value.isfinite().all()) for value in values):
            raise AdapterError(carried.spec.name, "holds NaN or infinity in one of the adapters")
        if carried.rows:
            rows = [
                torch.stack([values[number][position] for number, position in places]).mean(dim=0)
                for places in carried.rows
            ]
            self.write(carried.spec, torch.stack(rows))
        else:
            self.write(carried.spec, torch.stack(values).mean(dim=0))


class _Modules:
    """Writes the modules of a plan."""

    def __init__(
        self, plan: AdapterPlan, writer: TensorWriter, method: Method, kind: Arithmetic
    ) -> None:
        self.writer = writer
        self.method = method
        self.kind = kind
        self.twins: dict[str, ModuleJob] = {
            job.joint.twin_of: job
            for job in plan.jobs
            if job.route == "twin" and job.joint.twin_of is not None
        }

    def write(self, job: ModuleJob) -> list[ModuleReport]:
        """Write one module, and the head that is tied to it; return what was written."""
        if job.route == "copy":
            for slot, spec in job.specs.items():
                if slot is Slot.ALPHA:
                    self.writer.write(spec, torch.tensor(job.output.alpha, dtype=torch.float32))
                else:
                    self.writer.copy(spec, job.joint.terms[0].site.slots[slot])
            return [measure(job, self.kind)]
        tensors, report = compute(job, self.method, self.kind)
        for slot, tensor in tensors.items():
            self.writer.write(job.specs[slot], tensor)
        reports = [report]
        twin = self.twins.get(job.joint.name)
        if twin is not None:
            for slot, tensor in transposed(twin, tensors).items():
                self.writer.write(twin.specs[slot], tensor)
            reports.append(_scaled(report, twin))
        return reports


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
