"""The only loop that moves tensor data.

A plan becomes units of work: ranges of bytes to copy, and tensors to compute. Copies come first,
so that they run while torch is still being imported; then the worker threads take the tensors
apart into blocks of rows that fit the cache. Where the result goes is a sink's business: files
when a plan is carried out, a comparison when it is verified.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from loratool.errors import MergeError
from loratool.files.inputs import InputFiles
from loratool.files.transfer import clone_file, copy_range, describe_write_error, write_all
from loratool.ops.plan import OutputFile, Plan, Step

if TYPE_CHECKING:
    from loratool.ops.kernels import Kernel

__all__ = ["ByteRange", "Run", "RunResult", "Sink", "TensorInWork", "run_plan", "write_plan"]

COPY_BYTES: Final = 32 << 20
MAX_THREADS: Final = 8
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes that go from an input to an output file as they are.

    Attributes:
        source: The input file.
        source_offset: Where they begin in it.
        file: Index of the output file.
        offset: Where they go in it.
        size: How many.
        step: The tensor they belong to, where a sink wants tensors one by one.
        position: Where in that tensor they begin.
    """

    source: Path
    source_offset: int
    file: int
    offset: int
    size: int
    step: Step | None = None
    position: int = 0


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
        """The share of the update that survived rounding; ``None`` where there was none."""
        return self.kept / self.total if self.total > 0 else None


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
        LoratoolError: An input changed or ended, the disk is full, or a result is not finite.
    """
    try:
        for sidecar in plan.sidecars:
            target = place / sidecar.name
            target.parent.mkdir(parents=True, exist_ok=True)
            content = sidecar.content
            if content is None:
                assert sidecar.source is not None
                content = sidecar.source.read_bytes()
            target.write_bytes(content)
        with ExitStack() as stack:
            outputs: list[int] = []
            for file in plan.files:
                path = place / file.name if plan.is_folder else place
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                stack.callback(os.close, descriptor)
                outputs.append(descriptor)
                os.ftruncate(descriptor, file.size)
                write_all(descriptor, memoryview(file.header), 0)
            sink = _FileSink(outputs)
            result = run_plan(
                plan,
                sink,
                allow_nonfinite=allow_nonfinite,
                device=device,
                threads=threads,
                progress=progress,
            )
            if sync:
                for descriptor in outputs:
                    os.fsync(descriptor)
    except OSError as error:
        raise describe_write_error(place, error) from None
    if result.is_empty and not any(step.added or step.replaced for step in plan.steps()):
        raise MergeError(
            ", ".join(str(adapter.path) for adapter, _ in plan.adapters),
            "every delta is exactly zero (an untrained adapter, or alpha 0), so the merge would "
            "change nothing",
        )
    return result


class _FileSink:
    """Writes to files that are already as long as they will be."""

    joins = True

    def __init__(self, outputs: list[int]) -> None:
        self.outputs = outputs

    def copy(self, piece: ByteRange, files: InputFiles) -> None:
        source = files.descriptor(piece.source)
        copy_range(
            source,
            self.outputs[piece.file],
            piece.source_offset,
            piece.offset,
            piece.size,
            path=piece.source,
        )

    def write(self, tensor: TensorInWork, position: int, data: memoryview) -> None:
        write_all(self.outputs[tensor.file], data, tensor.offset + position)

    def clone(self, file: int, original: Path, files: InputFiles) -> bool:
        """Share the extents of a whole file, where the file system can."""
        return clone_file(files.descriptor(original), self.outputs[file])


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
    files = InputFiles()
    try:
        pieces, jobs = _split(plan, sink, files)
        run = Run(plan, sink, files, pieces, jobs, allow_nonfinite, device)
        run.start(threads or min(MAX_THREADS, len(os.sched_getaffinity(0))), progress)
        files.check_unchanged()
    finally:
        files.close()
    return run.result


def _split(
    plan: Plan, sink: Sink, files: InputFiles
) -> tuple[deque[ByteRange], deque[tuple[Step, int, int]]]:
    """Return the ranges of bytes to copy, long ones cut, and the tensors to compute."""
    pieces: deque[ByteRange] = deque()
    jobs: deque[tuple[Step, int, int]] = deque()
    for number, file in enumerate(plan.files):
        cloned = file.original is not None and sink.clone(number, file.original.path, files)
        for piece in () if cloned else _ranges(file, number, joins=sink.joins):
            for done in range(0, piece.size, COPY_BYTES):
                pieces.append(
                    replace(
                        piece,
                        source_offset=piece.source_offset + done,
                        offset=piece.offset + done,
                        size=min(COPY_BYTES, piece.size - done),
                        position=done,
                    )
                )
        jobs.extend(
            (step, number, offset)
            for step, offset in file.placed()
            if not step.is_copy and step.spec.nbytes
        )
    return pieces, jobs


def _ranges(file: OutputFile, number: int, *, joins: bool) -> Iterator[ByteRange]:
    """Yield the bytes that are copied, tensor by tensor, or neighbours as one range."""
    current: ByteRange | None = None
    for step, offset in file.placed():
        if not step.is_copy or not step.spec.nbytes:
            continue
        source, size = step.source, step.spec.nbytes
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


@dataclass
class TensorInWork:
    """One tensor in work: its kernel, made by whichever thread comes first."""

    step: Step
    file: int
    offset: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    kernel: Kernel | None = None
    next_block: int = 0


class Run:
    """The state that worker threads share."""

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        files: InputFiles,
        pieces: deque[ByteRange],
        jobs: deque[tuple[Step, int, int]],
        allow_nonfinite: bool,
        device: str,
    ) -> None:
        self.device = device
        self.sink = sink
        self.files = files
        self.pieces = pieces
        self.jobs = jobs
        self.allow_nonfinite = allow_nonfinite
        self.result = RunResult()
        self.total = sum(piece.size for piece in pieces) + sum(
            step.spec.nbytes for step, _, _ in jobs
        )
        self.done = 0
        self.failure: BaseException | None = None
        self.stopped = False
        self.current: TensorInWork | None = None
        self.lock = threading.Lock()

    def start(self, threads: int, progress: Progress | None) -> None:
        """Run all units of work on ``threads`` threads and wait for them."""
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
                        progress(self.done, self.total)
        except BaseException:
            self.stopped = True
            for worker in workers:
                worker.join()
            raise
        if self.failure is not None:
            raise self.failure
        if progress is not None:
            progress(self.total, self.total)

    def _work(self) -> None:
        try:
            while not self.stopped:
                try:
                    piece = self.pieces.popleft()
                except IndexError:
                    break
                self.sink.copy(piece, self.files)
                self.count(piece.size)
            if self.jobs or self.current is not None:
                from loratool.ops.worker import work

                work(self)
        except BaseException as error:
            self.stopped = True
            with self.lock:
                self.failure = self.failure or error

    def take(self) -> tuple[TensorInWork, int] | None:
        """Return the next block of the tensor in work, or of the next tensor."""
        from loratool.ops.kernels import compile_step
        from loratool.ops.tensors import resolve_device

        while not self.stopped:
            with self.lock:
                tensor = self.current
                if tensor is None:
                    if not self.jobs:
                        return None
                    tensor = self.current = TensorInWork(*self.jobs.popleft())
            with tensor.lock:
                if tensor.kernel is None:
                    tensor.kernel = compile_step(
                        tensor.step, self.files, resolve_device(self.device)
                    )
                block = tensor.next_block
                tensor.next_block += 1
                if block < tensor.kernel.blocks:
                    return tensor, block
            with self.lock:
                if self.current is tensor:
                    self.current = None
        return None

    def count(self, size: int) -> None:
        """Note that ``size`` bytes of output are done."""
        with self.lock:
            self.done += size
