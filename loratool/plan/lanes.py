"""Who works on what: one lane of work for each output file.

File systems let one thread at a time write to a file, so threads keep to files of their own as
long as there are enough, and help each other at the end.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from loratool.plan.run import Run

__all__ = ["ByteRange", "Lane", "Lanes", "Spot", "Task", "Unit"]


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a tensor goes.

    Attributes:
        spec: The tensor.
        file: Index of the output file.
        offset: Where it begins there.
    """

    spec: TensorSpec
    file: int
    offset: int


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes that go from an input to an output file as they are.

    Attributes:
        source: The input file.
        source_offset: Where they begin in it.
        spot: The tensor that they belong to; the first of them, where several are joined.
        size: How many.
        position: Where in that tensor they begin.
    """

    source: Path
    source_offset: int
    spot: Spot
    size: int
    position: int = 0

    @property
    def offset(self) -> int:
        """Where they go in the output file."""
        return self.spot.offset + self.position


Unit = Callable[[], None]
"""A piece of a task that one thread carries out."""


class Task(Protocol):
    """Something that is computed, in units of which no two depend on each other.

    Attributes:
        nbytes: Bytes of output.
        effort: Bytes that it goes through, roughly.
    """

    @property
    def nbytes(self) -> int: ...
    @property
    def effort(self) -> int: ...
    @property
    def written(self) -> Iterable[Spot]:
        """What it hands over, where that is known beforehand to the byte."""
        ...

    def reads(self) -> Iterable[StoredTensor]:
        """Return what of large inputs is read for it, in order."""
        ...

    def prepare(self) -> None:
        """Load what its units are computed with."""
        ...

    def take(self, run: Run) -> Unit | None:
        """Return a unit that nobody else does, or ``None`` if all are taken."""
        ...


@dataclass
class Lane:
    """The work on one output file.

    Attributes:
        pieces: Ranges of bytes to copy.
        tasks: What is computed; the first is the one in work.
        workers: How many threads are at it.
    """

    pieces: deque[ByteRange] = field(default_factory=deque)
    tasks: deque[Task] = field(default_factory=deque)
    workers: int = 0


class Lanes:
    """All lanes, and the lock that threads take to choose among them."""

    def __init__(self, lanes: list[Lane]) -> None:
        self.lanes = lanes
        self.total = sum(
            sum(piece.size for piece in lane.pieces) + sum(task.nbytes for task in lane.tasks)
            for lane in lanes
        )
        self._lock = threading.Lock()

    def efforts(self) -> list[int]:
        """Return sizes in bytes: of the tasks, or of the copies where these outweigh them."""
        tasks = [task.effort for lane in self.lanes for task in lane.tasks]
        copies = [piece.size for lane in self.lanes for piece in lane.pieces]
        return tasks if sum(tasks) > sum(copies) else copies

    @property
    def has_tasks(self) -> bool:
        """Whether anything is left to compute."""
        return any(lane.tasks for lane in self.lanes)

    def prepare(self) -> None:
        """Load what the first task needs; the others are of its kind."""
        first = next((lane.tasks[0] for lane in self.lanes if lane.tasks), None)
        if first is not None:
            first.prepare()

    def copies(self) -> Iterator[ByteRange]:
        """Yield ranges to copy until none are left; for one thread."""
        for lane in self._turns(lambda lane: bool(lane.pieces)):
            while True:
                try:
                    piece = lane.pieces.popleft()
                except IndexError:
                    break
                yield piece

    def units(self, run: Run) -> Iterator[Unit]:
        """Yield units of tasks until none are left; for one thread."""
        for lane in self._turns(lambda lane: bool(lane.tasks)):
            while lane.tasks:
                try:
                    task = lane.tasks[0]
                except IndexError:
                    break
                unit = task.take(run)
                if unit is not None:
                    yield unit
                    continue
                with self._lock:
                    if lane.tasks and lane.tasks[0] is task:
                        lane.tasks.popleft()

    def _turns(self, has_work: Callable[[Lane], bool]) -> Iterator[Lane]:
        """Yield the lane with work that has fewest threads at it, until there is none."""
        while True:
            with self._lock:
                waiting = [lane for lane in self.lanes if has_work(lane)]
                if not waiting:
                    return
                lane = min(waiting, key=lambda lane: lane.workers)
                lane.workers += 1
            try:
                yield lane
            finally:
                with self._lock:
                    lane.workers -= 1
