"""The only loop that moves tensor data.

A plan becomes units of work: ranges of bytes to copy, and tensors to compute. Copies come first;
then the worker threads take the tensors apart into blocks of rows that fit the cache. Where the
result goes is a sink's business: files when a plan is carried out, a comparison when it is
verified.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from loratool.errors import MergeError
from loratool.files.descriptors import Descriptors
from loratool.files.inputs import InputFiles
from loratool.files.transfer import clone_file, copy_range, write_all
from loratool.ops.lanes import ByteRange, Lane, Lanes, TensorInWork
from loratool.ops.plan import OutputFile, Plan
from loratool.plan.sidecar import write_sidecar

__all__ = ["Run", "RunResult", "Sink", "run_plan", "write_plan"]

COPY_BYTES: Final = 32 << 20
MAX_THREADS: Final = 8
Progress = Callable[[int, int], None]


class Sink(Protocol):
    """Where results go.

    Attributes:
        joins: Whether neighbouring tensors may be handed over as one range.
    """

    joins: bool

    def copy(self, piece: ByteRange, files: InputFiles) -> None:
        """Take bytes of an input as they are."""
        ...

    def write(self, tensor: TensorInWork, position: int, data: memoryview) -> None:
        """Take the computed bytes at ``position`` of a tensor."""
        ...

    def clone(self, file: int, original: Path, files: InputFiles) -> bool:
        """Take a whole file at once, where that is free; return whether it was."""
        ...


@dataclass
class RunResult:
    """What a run measured.

    Attributes:
        kept: ``Σ ⟨W' - W, Δ⟩`` over the measured elements.
        total: ``Σ ‖Δ‖²`` over the same.
        is_empty: Whether every delta turned out to be exactly zero.
    """

    kept: float = 0.0
    total: float = 0.0
    is_empty: bool = True

    @property
    def retention(self) -> float | None:
        """The share of the update that survived rounding; ``None`` where it has no meaning."""
        has_meaning = self.total > 0 and math.isfinite(self.kept) and math.isfinite(self.total)
        return self.kept / self.total if has_meaning else None


def write_plan(
    plan: Plan,
    place: Path,
    *,
    allow_nonfinite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    sync: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Carry out ``plan`` at ``place``, a folder or a file that nothing else uses.

    Raises:
        LoratoolError: An input changed or ended, or a result is not finite.
        OSError: Writing failed, such as for want of space.
    """
    for sidecar in plan.sidecars:
        write_sidecar(sidecar, place)
    paths = tuple(place / file.name if plan.is_folder else place for file in plan.files)
    for path, file in zip(paths, plan.files, strict=True):
        _begin(path, file)
    outputs = Descriptors(lambda path: os.open(path, os.O_RDWR | os.O_CLOEXEC))
    try:
        result = run_plan(
            plan,
            _FileSink(paths, outputs),
            allow_nonfinite=allow_nonfinite,
            device=device,
            threads=threads,
            progress=progress,
        )
        for path in paths if sync else ():
            with outputs.using(path) as descriptor:
                os.fsync(descriptor)
    finally:
        outputs.close()
    if result.is_empty and not any(step.added or step.replaced for step in plan.steps()):
        raise MergeError(
            ", ".join(str(adapter.path) for adapter, _ in plan.adapters),
            "every delta is exactly zero (an untrained adapter, or alpha 0), so the merge would "
            "change nothing",
        )
    return result


def _begin(path: Path, file: OutputFile) -> None:
    """Create an output file as long as it will be, its header in it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, file.size)
        write_all(descriptor, memoryview(file.header), 0)
    finally:
        os.close(descriptor)


class _FileSink:
    """Writes to files that are already as long as they will be."""

    joins = True

    def __init__(self, paths: tuple[Path, ...], outputs: Descriptors) -> None:
        self.paths = paths
        self.outputs = outputs

    def copy(self, piece: ByteRange, files: InputFiles) -> None:
        with (
            files.using(piece.source) as source,
            self.outputs.using(self.paths[piece.file]) as target,
        ):
            copy_range(
                source, target, piece.source_offset, piece.offset, piece.size, path=piece.source
            )

    def write(self, tensor: TensorInWork, position: int, data: memoryview) -> None:
        with self.outputs.using(self.paths[tensor.file]) as target:
            write_all(target, data, tensor.offset + position)

    def clone(self, file: int, original: Path, files: InputFiles) -> bool:
        """Share the extents of a whole file, where the file system can."""
        with (
            files.using(original) as source,
            self.outputs.using(self.paths[file]) as target,
        ):
            return clone_file(source, target)


def run_plan(
    plan: Plan,
    sink: Sink,
    *,
    allow_nonfinite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Compute every tensor of ``plan`` and hand it to ``sink``.

    Raises:
        LoratoolError: The first failure of any thread.
    """
    files = InputFiles(plan.stamps)
    try:
        for path in plan.stamps:
            with files.using(path):
                pass  # before any work is done: it is still what was planned with
        lanes = Lanes([_lane(file, i, sink, files) for i, file in enumerate(plan.files)])
        run = Run(lanes, sink, files, allow_nonfinite=allow_nonfinite, device=device)
        run.start(threads or min(MAX_THREADS, len(os.sched_getaffinity(0))), progress)
        files.check_unchanged()
    finally:
        files.close()
    return run.result()


def _lane(file: OutputFile, number: int, sink: Sink, files: InputFiles) -> Lane:
    """Return the work on one file: ranges to copy, long ones cut, and tensors to compute."""
    lane = Lane()
    cloned = file.original is not None and sink.clone(number, file.original.path, files)
    for piece in () if cloned else _ranges(file, number, joins=sink.joins):
        for done in range(0, piece.size, COPY_BYTES):
            lane.pieces.append(
                replace(
                    piece,
                    source_offset=piece.source_offset + done,
                    offset=piece.offset + done,
                    size=min(COPY_BYTES, piece.size - done),
                    position=done,
                )
            )
    lane.tensors.extend(
        TensorInWork(step, number, offset)
        for step, offset in file.placed()
        if not step.is_copy and step.spec.nbytes
    )
    return lane


def _ranges(file: OutputFile, number: int, *, joins: bool) -> Iterator[ByteRange]:
    """Yield the bytes that are copied, tensor by tensor, or neighbours as one range."""
    current: ByteRange | None = None
    for step, offset in file.placed():
        source, size = step.copied, step.spec.nbytes
        if source is None or not size:
            continue
        if (
            joins
            and current is not None
            and current.source == source.path
            and current.source_offset + current.size == source.offset
            and current.offset + current.size == offset
        ):
            current = replace(current, size=current.size + size)
            continue
        if current is not None:
            yield current
        current = ByteRange(source.path, source.offset, number, offset, size, step)
    if current is not None:
        yield current


class Run:
    """The state that the threads of one run share."""

    def __init__(
        self, lanes: Lanes, sink: Sink, files: InputFiles, *, allow_nonfinite: bool, device: str
    ) -> None:
        self.lanes = lanes
        self.sink = sink
        self.files = files
        self.allow_nonfinite = allow_nonfinite
        self.device = device
        self.done = 0
        self.is_empty = True
        self._kept: list[float] = []
        self._total: list[float] = []
        self.failure: BaseException | None = None
        self.stopped = False
        self.lock = threading.Lock()

    def start(self, threads: int, progress: Progress | None) -> None:
        """Do all the work on ``threads`` threads and wait for them."""
        workers = [
            threading.Thread(target=self._work, name=f"loratool-{i}", daemon=True)
            for i in range(max(1, threads))
        ]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.05)
                    if progress is not None:
                        progress(self.done, self.lanes.total)
        except BaseException:
            self.stopped = True
            for worker in workers:
                worker.join()
            raise
        if self.failure is not None:
            raise self.failure
        if progress is not None:
            progress(self.lanes.total, self.lanes.total)

    def _work(self) -> None:
        try:
            for piece in self.lanes.copies():
                if self.stopped:
                    return
                self.sink.copy(piece, self.files)
                self.count(piece.size)
            if self.lanes.has_tensors:
                from loratool.ops.worker import work

                work(self)
        except BaseException as error:
            self.stopped = True
            with self.lock:
                self.failure = self.failure or error

    def count(self, size: int) -> None:
        """Note that ``size`` bytes of output are done."""
        with self.lock:
            self.done += size

    def note(self, kept: float, total: float, *, is_empty: bool) -> None:
        """Note ``⟨W' - W, Δ⟩`` and ``‖Δ‖²`` of a block, zero where they were not measured.

        ``is_empty`` says whether nothing but zeros was added to its tensor.
        """
        with self.lock:
            self.is_empty &= is_empty
            if total:
                self._kept.append(kept)
                self._total.append(total)

    def result(self) -> RunResult:
        """Return what was measured; the same, whichever thread came first."""
        try:
            kept, total = math.fsum(self._kept), math.fsum(self._total)
        except (OverflowError, ValueError):  # infinite numbers that were allowed
            kept = total = math.inf
        return RunResult(kept, total, self.is_empty)
