"""The only loop that moves tensor data.

A plan becomes units of work: ranges of bytes to copy, and tasks to compute. Copies come first;
then the worker threads take the tasks apart: weights that are patched into blocks of rows that fit
the cache, modules of an adapter one by one. Where the result goes is a sink's business: files when
a plan is carried out, a comparison when it is verified, nowhere when only errors are asked for.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from loratool.files.descriptors import Descriptors
from loratool.files.inputs import InputFiles, Stamp
from loratool.files.spec import StoredTensor
from loratool.files.transfer import clone_file, copy_range, read_into, write_all
from loratool.plan.lanes import ByteRange, Lane, Lanes, Spot, Task
from loratool.plan.threads import Progress, usual_threads

if TYPE_CHECKING:
    from loratool.plan.blocks import Bench

__all__ = [
    "FileWork",
    "NullSink",
    "Run",
    "RunResult",
    "Sink",
    "exact_sum",
    "joined_ranges",
    "run_files",
    "write_files",
]

COPY_BYTES: Final = 32 << 20
SHORT: Final = 1 << 20
"""Ranges up to this size go through a buffer, which is quicker than copying inside the kernel."""


class Sink(Protocol):
    """Where results go.

    Attributes:
        joins: Whether neighbouring tensors may be handed over as one range.
    """

    joins: bool

    def copy(self, piece: ByteRange, files: InputFiles) -> None:
        """Take bytes of an input as they are."""
        ...

    def write(self, spot: Spot, position: int, data: memoryview) -> None:
        """Take the computed bytes at ``position`` of a tensor."""
        ...

    def clone(self, file: int, original: Path, files: InputFiles) -> bool:
        """Take a whole file at once, where that is free; return whether it was."""
        ...


@dataclass(frozen=True)
class FileWork:
    """What is to be done for one output file.

    Attributes:
        name: Its name in the output folder.
        size: Its size in bytes.
        header: The bytes that it begins with, as far as they are known before the data.
        moves: Tensors that are stored bytes, and where they go; in the order of the file.
        tasks: What is computed.
        original: An input that it equals but for what is computed.
        seal: Called with the file once all of its data is there.
    """

    name: str
    size: int
    header: bytes = b""
    moves: Sequence[tuple[Spot, StoredTensor]] = ()
    tasks: Sequence[Task] = field(default=())
    original: Path | None = None
    seal: Callable[[Path], None] | None = None


@dataclass
class RunResult:
    """What a run measured.

    Attributes:
        kept: ``Σ ⟨W' - W, Δ⟩`` over the measured elements.
        total: ``Σ ‖Δ‖²`` over the same.
        is_empty: Whether every delta turned out to be exactly zero.
        parts: Both sums exactly; see :func:`exact_sum`.
    """

    kept: float = 0.0
    total: float = 0.0
    is_empty: bool = True
    parts: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())

    @staticmethod
    def of(kept: Sequence[float], total: Sequence[float], *, is_empty: bool) -> RunResult:
        """Return the sums of what blocks, or parts of a run, have measured; in any order."""
        parts = exact_sum(kept), exact_sum(total)
        first, second = (each[0] if each else 0.0 for each in parts)
        return RunResult(first, second, is_empty, parts)

    @property
    def retention(self) -> float | None:
        """The share of the update that survived rounding; ``None`` where it has no meaning."""
        has_meaning = self.total > 0 and math.isfinite(self.kept) and math.isfinite(self.total)
        return self.kept / self.total if has_meaning else None


def exact_sum(numbers: Sequence[float]) -> tuple[float, ...]:
    """Return few numbers with exactly the sum of many, the largest first: what that rounds to.

    So sums of sums are those of everything, however it was divided (Shewchuk 1997, expansions).
    """
    found: list[float] = []
    try:
        while rest := math.fsum([*numbers, *(-each for each in found)]):
            found.append(rest)
            if not math.isfinite(rest):
                break
    except (OverflowError, ValueError):  # infinite numbers that were allowed
        return (math.inf,)
    return tuple(found) if all(map(math.isfinite, found)) else (math.inf,)


def write_files(
    works: Sequence[FileWork],
    paths: Sequence[Path],
    stamps: Mapping[Path, Stamp],
    *,
    allow_nonfinite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    is_shared: bool = False,
) -> RunResult:
    """Carry out ``works`` at ``paths``, where nothing is yet, or which others write to as well.

    Args:
        works: What to do.
        paths: The file for each.
        stamps: What the inputs were.
        allow_nonfinite: Write NaN and infinity where they come out.
        device: Where to compute.
        threads: Number of worker threads.
        progress: Called with bytes done and bytes in all.
        is_shared: Whether others may be at the same files, with other bytes of them.

    Raises:
        LoratoolError: An input changed or ended, or a result is not finite.
        OSError: Writing failed, such as for want of space.
    """
    sink = _FileSink(tuple(paths), tuple(works), is_shared=is_shared)
    try:
        result = run_files(
            works,
            sink,
            stamps,
            allow_nonfinite=allow_nonfinite,
            device=device,
            threads=threads,
            progress=progress,
        )
        sink.begin_rest()
    finally:
        sink.close()
    for path, work in zip(paths, works, strict=True):
        if work.seal is not None:
            work.seal(path)
    return result


class _FileSink:
    """Writes to files, each of which is made when something is first written to it."""

    joins = True

    def __init__(
        self, paths: tuple[Path, ...], works: tuple[FileWork, ...], *, is_shared: bool
    ) -> None:
        self.paths = paths
        self._alone = 0 if is_shared else os.O_EXCL
        self.outputs = Descriptors(self._open)
        self._lacking = dict(zip(paths, works, strict=True))
        self._clones = True
        self._local = threading.local()

    def _open(self, path: Path) -> int:
        """Open an output file; make it first, as long as it will be, its header in it."""
        work = self._lacking.get(path)
        if work is None:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | self._alone, 0o666)
        del self._lacking[path]
        try:
            os.ftruncate(descriptor, work.size)
            write_all(descriptor, memoryview(work.header), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def begin_rest(self) -> None:
        """Make the files that nothing was written to, for their tensors are empty."""
        for path in tuple(self._lacking):
            with self.outputs.using(path):
                pass

    def close(self) -> None:
        """Close all files."""
        self.outputs.close()

    def copy(self, piece: ByteRange, files: InputFiles) -> None:
        path = piece.source
        with (
            files.using(path) as source,
            self.outputs.using(self.paths[piece.spot.file]) as target,
        ):
            if piece.size <= SHORT:
                view = self._buffer()[: piece.size]
                read_into(source, view, piece.source_offset, path=path)
                write_all(target, view, piece.offset)
            else:
                copy_range(source, target, piece.source_offset, piece.offset, piece.size, path=path)

    def _buffer(self) -> memoryview:
        """Return memory of this thread's own."""
        found: memoryview | None = getattr(self._local, "buffer", None)
        if found is None:
            found = self._local.buffer = memoryview(bytearray(SHORT))
        return found

    def write(self, spot: Spot, position: int, data: memoryview) -> None:
        with self.outputs.using(self.paths[spot.file]) as target:
            write_all(target, data, spot.offset + position)

    def clone(self, file: int, original: Path, files: InputFiles) -> bool:
        """Share the extents of a whole file, where the file system can; one trial tells."""
        if not self._clones:
            return False
        with (
            files.using(original) as source,
            self.outputs.using(self.paths[file]) as target,
        ):
            self._clones = clone_file(source, target)
        return self._clones


class NullSink:
    """Takes everything and keeps nothing: a run that only measures."""

    joins = True

    def copy(self, piece: ByteRange, files: InputFiles) -> None:
        """Leave the bytes where they are."""

    def write(self, spot: Spot, position: int, data: memoryview) -> None:
        """Drop the bytes."""

    def clone(self, file: int, original: Path, files: InputFiles) -> bool:
        return True


def run_files(
    works: Sequence[FileWork],
    sink: Sink,
    stamps: Mapping[Path, Stamp],
    *,
    allow_nonfinite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Do all of ``works`` and hand the results to ``sink``.

    Raises:
        LoratoolError: The first failure of any thread.
    """
    files = InputFiles(stamps)
    try:
        for path in stamps:
            with files.using(path):
                pass  # before any work is done: it is still what was planned with
        lanes = Lanes([_lane(work, number, sink, files) for number, work in enumerate(works)])
        _expect(lanes, files)
        run = Run(lanes, sink, files, allow_nonfinite=allow_nonfinite, device=device)
        run.start(threads or usual_threads(lanes.efforts()), progress)
        files.check_unchanged()
    finally:
        files.close()
    return run.result()


def _expect(lanes: Lanes, files: InputFiles) -> None:
    """Say what will be read, in order: copies come first."""
    for lane in lanes.lanes:
        for piece in lane.pieces:
            files.expect((piece.source, piece.source_offset, piece.size))
    for lane in lanes.lanes:
        for task in lane.tasks:
            files.expect(*(extent for stored in task.reads() for extent in stored.extents))


def _lane(work: FileWork, number: int, sink: Sink, files: InputFiles) -> Lane:
    """Return the work on one file: ranges to copy, long ones cut, and tasks."""
    lane = Lane()
    cloned = work.original is not None and sink.clone(number, work.original, files)
    for piece in () if cloned else joined_ranges(work.moves, joins=sink.joins):
        for done in range(0, piece.size, COPY_BYTES):
            lane.pieces.append(
                replace(
                    piece,
                    source_offset=piece.source_offset + done,
                    size=min(COPY_BYTES, piece.size - done),
                    position=done,
                )
            )
    lane.tasks.extend(work.tasks)
    return lane


def joined_ranges(
    moves: Iterable[tuple[Spot, StoredTensor]], *, joins: bool
) -> Iterator[ByteRange]:
    """Yield the bytes that are copied, tensor by tensor, or neighbours as one range."""
    first: tuple[Path, int, Spot] | None = None  # where a range begins
    size = 0
    for spot, source in moves:
        more = spot.spec.nbytes
        if not more:
            continue
        if first is not None:
            path, begin, start = first
            if (
                joins
                and path == source.path
                and begin + size == source.offset
                and start.offset + size == spot.offset
            ):
                size += more
                continue
            yield ByteRange(path, begin, start, size)
        first, size = (source.path, source.offset, spot), more
    if first is not None:
        yield ByteRange(*first, size)


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
        self._local = threading.local()

    def start(self, threads: int, progress: Progress | None) -> None:
        """Do all the work on ``threads`` threads and wait for them."""
        workers = [
            threading.Thread(target=self._work, args=(i,), name=f"loratool-{i}", daemon=True)
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

    def _work(self, number: int) -> None:
        try:
            if number == 0:
                self.lanes.prepare()  # while other threads copy
            for piece in self.lanes.copies():
                if self.stopped:
                    return
                self.sink.copy(piece, self.files)
                self.count(piece.size)
            if self.lanes.has_tasks:
                self._compute()
        except BaseException as error:
            self.stopped = True
            with self.lock:
                self.failure = self.failure or error

    def _compute(self) -> None:
        import numpy as np

        from loratool.plan.blas import single_threaded_blas

        with single_threaded_blas(), np.errstate(all="ignore"):
            for unit in self.lanes.units(self):
                if self.stopped:
                    return
                unit()

    @property
    def bench(self) -> Bench:
        """What this thread computes blocks with, kept from one to the next."""
        found: Bench | None = getattr(self._local, "bench", None)
        if found is None:
            from loratool.plan.blocks import bench_on

            found = self._local.bench = bench_on(self.device)
        return found

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
        return RunResult.of(self._kept, self._total, is_empty=self.is_empty)
