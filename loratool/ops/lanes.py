"""Who works on what: one lane of work for each output file.

File systems let one thread at a time write to a file, so threads keep to files of their own as
long as there are enough, and help each other at the end.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.ops.plan import Step

if TYPE_CHECKING:
    from loratool.ops.kernels import Kernel

__all__ = ["ByteRange", "Lane", "Lanes", "TensorInWork"]


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes that go from an input to an output file as they are.

    Attributes:
        source: The input file.
        source_offset: Where they begin in it.
        file: Index of the output file.
        offset: Where they go in it.
        size: How many.
        step: The tensor they belong to; the first of them, where several are joined.
        position: Where in that tensor they begin.
    """

    source: Path
    source_offset: int
    file: int
    offset: int
    size: int
    step: Step
    position: int = 0


@dataclass
class TensorInWork:
    """One tensor to compute: its kernel, made by whichever thread comes first.

    Attributes:
        step: How it comes about.
        file: Index of the output file.
        offset: Where it begins there.
        kernel: Its arithmetic, once there is one.
    """

    step: Step
    file: int
    offset: int
    kernel: Kernel | None = None
    next_block: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, compile_step: Callable[[Step], Kernel]) -> int | None:
        """Return the index of a block that nobody else does, or ``None`` if all are taken."""
        with self.lock:
            if self.kernel is None:
                self.kernel = compile_step(self.step)
            if self.next_block == self.kernel.blocks:
                return None
            self.next_block += 1
            return self.next_block - 1


@dataclass
class Lane:
    """The work on one output file.

    Attributes:
        pieces: Ranges of bytes to copy.
        tensors: Tensors to compute; the first is the one in work.
        workers: How many threads are at it.
    """

    pieces: deque[ByteRange] = field(default_factory=deque)
    tensors: deque[TensorInWork] = field(default_factory=deque)
    workers: int = 0


class Lanes:
    """All lanes, and the lock that threads take to choose among them."""

    def __init__(self, lanes: list[Lane]) -> None:
        self.lanes = lanes
        self.total = sum(
            sum(piece.size for piece in lane.pieces)
            + sum(tensor.step.spec.nbytes for tensor in lane.tensors)
            for lane in lanes
        )
        self._lock = threading.Lock()

    @property
    def has_tensors(self) -> bool:
        """Whether anything is left to compute."""
        return any(lane.tensors for lane in self.lanes)

    def copies(self) -> Iterator[ByteRange]:
        """Yield ranges to copy until none are left; for one thread."""
        for lane in self._turns(lambda lane: bool(lane.pieces)):
            while True:
                try:
                    piece = lane.pieces.popleft()
                except IndexError:
                    break
                yield piece

    def blocks(self, compile_step: Callable[[Step], Kernel]) -> Iterator[tuple[TensorInWork, int]]:
        """Yield tensors and indices of their blocks until none are left; for one thread."""
        for lane in self._turns(lambda lane: bool(lane.tensors)):
            while lane.tensors:
                try:
                    tensor = lane.tensors[0]
                except IndexError:
                    break
                index = tensor.take(compile_step)
                if index is not None:
                    yield tensor, index
                    continue
                with self._lock:
                    if lane.tensors and lane.tensors[0] is tensor:
                        lane.tensors.popleft()

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
