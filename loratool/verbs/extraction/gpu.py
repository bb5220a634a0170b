"""Differences formed and decomposed on GPUs, as fast as their bytes can be brought there.

What bounds the work is the way of the bytes: from the disk, and over the bus. So several modules
are in work at a time, each in a *lane* with a stream of its own: while one waits for its bytes or
for the processor, the others compute. Bytes go to the GPU as they are stored, two for a number
of bfloat16, from memory that is pinned once and used again; the difference is formed there.
Everything that the processor has to know of a module it asks for in a few words, at most
``MOST_WAITS`` times.

Where a GPU has too little memory, modules are taken one at a time, and one that does not fit even
then in tiles of rows, which are brought there again for every product; at last the processor
does it. Each step is a note.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Final, TypeVar

import torch
from torch import Tensor

from loratool.codecs.weights import Weight, rows_of
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor
from loratool.files.transfer import read_into
from loratool.math.extraction import TINY, noise_floor, squared_norm
from loratool.math.tiles import NeedsAllRowsError, RowTiles
from loratool.plan.gpu import exact_products, torch_dtype
from loratool.verbs.extraction.pairs import Target
from loratool.verbs.extraction.reading import (
    PRECISIONS,
    SAMPLED,
    Change,
    Differences,
    HostDifferences,
    extent,
)

__all__ = ["LANES", "MOST_WAITS", "GpuDifferences", "gpu_memory"]

Result = TypeVar("Result")
LANES: Final = 4
"""Modules in work at a time on one GPU."""
SLOT_BYTES: Final = 16 << 20
SLOTS: Final = 4
"""Pinned memory of a lane: while one slot is on its way to the GPU, others are read into."""
READERS: Final = 12
"""Threads that read files, for all lanes together."""
MOST_WAITS: Final = 12
"""How often at most the processor waits for the GPU in one module of a fixed rank."""
TILE_BYTES: Final = 32 << 20
"""Bytes of a difference in float32 that are on the GPU at a time where all of it is too large."""
CONTEXT_BYTES: Final = 600 << 20
"""What CUDA itself and its libraries take of a GPU's memory, roughly."""
OUT_OF_MEMORY: Final = ("out of memory", "ALLOC_FAILED", "NOT_INITIALIZED")
"""What errors of CUDA's libraries say where memory is short."""
EXPONENTS: Final = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000, "F64": 0x7FF0 << 48}
"""The bits that hold the exponent of a number."""


def gpu_memory(elements: Sequence[int], bases: Sequence[int], sides: Sequence[int]) -> int:
    """Return roughly how many bytes of a GPU's memory an extraction takes at most.

    Args:
        elements: Of each module's weight.
        bases: Columns of each module's basis.
        sides: Rows and columns of each module together.
    """
    largest = sorted(elements, reverse=True)[:LANES]
    basis = max((4 * size * side for size, side in zip(bases, sides, strict=True)), default=0)
    return CONTEXT_BYTES + 8 * sum(largest) + 3 * len(largest) * basis


class GpuDifferences:
    """Differences formed on one or several GPUs.

    Args:
        devices: The GPUs; each module goes to the first that has a lane free.
        lanes: Modules in work at a time on each.
    """

    def __init__(self, devices: Sequence[torch.device], *, lanes: int | None = None) -> None:
        lanes = lanes or LANES
        self.devices = tuple(devices)
        self.notes: list[str] = []
        self._limit = lanes * len(self.devices)
        self.threads = self._limit
        self._local = threading.local()
        self._host = HostDifferences()
        self._changed = threading.Condition()
        self._active = 0
        self._free = [_Lane(device, number) for number in range(lanes) for device in self.devices]
        self._open = ExitStack()

    def __enter__(self) -> GpuDifferences:
        self._open.enter_context(exact_products())
        readers = self._open.enter_context(ThreadPoolExecutor(READERS, "loratool-read"))
        for lane in self._free:
            lane.readers = readers
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self._free:
            lane.slots.clear()
        self._open.close()

    @property
    def device(self) -> str:
        """What a report calls it."""
        names = [f"{device} ({torch.cuda.get_device_name(device)})" for device in self.devices]
        return ", ".join(names)

    def run(self, work: Callable[[Differences], Result]) -> Result:
        """Return what ``work`` makes of differences, with less and less memory until it can."""
        ways: tuple[tuple[Differences, bool, str], ...] = (
            (self, False, "of modules at a time as memory allows"),
            (self, True, "one module at a time"),
            (_TiledDifferences(self), True, "by tiles of rows"),
        )
        for number, (source, is_alone, _) in enumerate(ways):
            try:
                with self._lane(is_alone=is_alone):
                    return work(source)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
            # Only here, after the error is gone with all that it held, is there memory again.
            torch.cuda.empty_cache()
            following = ways[number + 1][2] if number + 1 < len(ways) else "by the processor"
            self._note(f"the GPU's memory does not suffice: some modules were done {following}")
            self._limit = 1
        return work(self._host)

    def read(self, target: Target, expert: int, files: InputFiles) -> Change:
        """Return the change of a module, or of one of its experts, on the GPU of its lane."""
        lane: _Lane = self._local.lane
        rows, width, first = extent(target, expert)
        after, before = lane.upload(target, first, rows, width, files)
        delta = _difference(after, before, target)
        sample = after[::SAMPLED]
        squares, spacings = torch.stack([_squares(delta), _spacings(sample, target)]).tolist()
        if not math.isfinite(squares):
            _same_to_zero(delta, after, before)
        del after, before
        if not TINY * delta.numel() < squares < math.inf:
            squares = squared_norm(delta)
        floor = noise_floor(spacings, sample.numel(), (rows, width))
        return Change(delta.mT if target.is_transposed else delta, squares, floor)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @contextmanager
    def _lane(self, *, is_alone: bool) -> Iterator[None]:
        """Hold a lane; with nobody beside it where it is wanted alone."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._active if is_alone else self._active < self._limit
            )
            self._active += 1
            lane = self._free.pop(0)
        try:
            self._local.lane = lane
            with lane:
                if is_alone:
                    torch.cuda.empty_cache()  # of what others left, too
                yield
        finally:
            self._local.lane = None
            with self._changed:
                self._active -= 1
                self._free.append(lane)
                self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes of a file on their way to a place in a tensor of the GPU."""

    stored: StoredTensor
    start: int
    target: Tensor


class _Slot:
    """Pinned memory, and the event that says that it is free again."""

    def __init__(self) -> None:
        self.pinned = torch.empty(SLOT_BYTES, dtype=torch.uint8, pin_memory=True)
        self.view = self.pinned.numpy().data
        self.sent = torch.cuda.Event()  # type: ignore[no-untyped-call]


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """Return a stream of a GPU, the same one for each number.

    Its libraries keep memory for every stream that they have seen.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Lane:
    """A stream of one GPU, and the memory that feeds it."""

    def __init__(self, device: torch.device, number: int) -> None:
        self.device = device
        self.number = number
        self.slots: list[_Slot] = []
        self.readers: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._entered = ExitStack()

    def __enter__(self) -> None:
        if self._stream is None:
            self._stream = _stream(self.device, self.number)
        with ExitStack() as entered:
            entered.enter_context(torch.cuda.device(self.device))
            entered.enter_context(torch.cuda.stream(self._stream))
            self._entered = entered.pop_all()

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    def upload(
        self, target: Target, first: int, rows: int, width: int, files: InputFiles
    ) -> tuple[Tensor, Tensor]:
        """Return rows of the finetuned and of the base's weight on the GPU, as they are stored."""
        parts: list[_Part] = []
        found = [
            self._planned(weight, first, rows, width, files, parts)
            for weight in (target.tuned, target.base)
        ]
        self._send(parts, files)
        return found[0], found[1]

    def _planned(
        self,
        weight: Weight,
        first: int,
        rows: int,
        width: int,
        files: InputFiles,
        parts: list[_Part],
    ) -> Tensor:
        """Return room for rows of a weight, and note what has to be read into it."""
        if not isinstance(weight, StoredTensor) or not weight.is_run:
            return self._decoded(weight, first, rows, width, files)
        dtype = torch_dtype(weight.spec.dtype)
        room = torch.empty((rows, width), dtype=dtype, device=self.device)
        flat = room.view(-1).view(torch.uint8)
        offset = weight.offset + first * width * dtype.itemsize
        parts.extend(
            _Part(weight, offset + start, flat[start : start + SLOT_BYTES])
            for start in range(0, flat.shape[0], SLOT_BYTES)
        )
        return room

    def _decoded(
        self, weight: Weight, first: int, rows: int, width: int, files: InputFiles
    ) -> Tensor:
        """Return rows of a weight that only the processor can read."""
        source = rows_of(weight, width, files)
        dtype = torch_dtype(source.dtype)
        data = source.read(first, rows)
        values = torch.frombuffer(bytearray(data), dtype=dtype).view(rows, width)
        return values.pin_memory().to(self.device, non_blocking=True)

    def _send(self, parts: Sequence[_Part], files: InputFiles) -> None:
        """Read parts into pinned memory, a few ahead, and send each on once it is there."""
        while len(self.slots) < min(SLOTS, len(parts)):
            self.slots.append(_Slot())
        assert self.readers is not None
        waiting: list[Future[None]] = []
        try:
            for number in range(len(parts) + SLOTS - 1):
                if number < len(parts):
                    slot = self.slots[number % SLOTS]
                    waiting.append(self.readers.submit(_read, parts[number], slot, files))
                done = number - SLOTS + 1
                if done >= 0:
                    waiting[done].result()
                    part, slot = parts[done], self.slots[done % SLOTS]
                    part.target.copy_(slot.pinned[: part.target.shape[0]], non_blocking=True)
                    slot.sent.record()
        finally:
            for future in waiting:  # nobody else may use the slots before
                with contextlib.suppress(Exception):
                    future.cancel() or future.result()


def _read(part: _Part, slot: _Slot, files: InputFiles) -> None:
    slot.sent.synchronize()
    view = slot.view[: part.target.shape[0]]
    with files.using(part.stored.path) as descriptor:
        read_into(descriptor, view, part.start, path=part.stored.path)


class _TiledDifferences:
    """Differences of which only a few rows at a time are on the GPU.

    Args:
        whole: Whose lane and notes they use.
    """

    def __init__(self, whole: GpuDifferences) -> None:
        self._whole = whole
        self.device = whole.device
        self.threads = whole.threads
        self.notes = whole.notes

    def run(self, work: Callable[[Differences], Result]) -> Result:
        """Return what ``work`` makes of differences."""
        return work(self)

    def read(self, target: Target, expert: int, files: InputFiles) -> Change:
        """Return the change of a module as tiles that are formed whenever they are wanted."""
        lane: _Lane = self._whole._local.lane
        rows, width, first = extent(target, expert)
        kind = _kind(target)
        step = max(1, TILE_BYTES // (kind.itemsize * width))

        def tile(start: int, count: int) -> tuple[Tensor, Tensor]:
            after, before = lane.upload(target, first + start, count, width, files)
            delta = _difference(after, before, target)
            _same_to_zero(delta, after, before)
            return delta, after

        squares, spacings, sampled = [], [], 0
        for start in range(0, rows, step):
            delta, after = tile(start, min(step, rows - start))
            squares.append(squared_norm(delta))
            sample = after[-start % SAMPLED :: SAMPLED]
            spacings.append(float(_spacings(sample, target)))
            sampled += sample.numel()
        like = torch.empty((0, width), dtype=kind, device=lane.device)
        tiles = RowTiles(rows, step, lambda start, count: tile(start, count)[0], like)
        total = sum(squares) if all(map(math.isfinite, squares)) else math.inf
        floor = noise_floor(math.fsum(spacings), sampled, (rows, width))
        return Change(tiles.mT if target.is_transposed else tiles, total, floor)


def _kind(target: Target) -> torch.dtype:
    is_double = "F64" in (target.base.spec.dtype, target.tuned.spec.dtype)
    return torch.float64 if is_double else torch.float32


def _difference(after: Tensor, before: Tensor, target: Target) -> Tensor:
    """Return ``after - before``; zero where both are the same but for a conversion of dtypes.

    Where neither was converted that leaves infinities and NaN out; see :func:`_same_to_zero`.
    """
    delta = after.to(_kind(target), copy=True)
    delta -= before
    if after.dtype != before.dtype:
        _same_to_zero(delta, after, before)
    return delta


def _same_to_zero(delta: Tensor, after: Tensor, before: Tensor) -> None:
    """Make zero what is the same in both, infinities and NaN too."""
    stored = before.to(after.dtype)
    delta.masked_fill_((stored == after) | (stored.isnan() & after.isnan()), 0)


def _squares(delta: Tensor) -> Tensor:
    """Return ``‖Δ‖²``, rows summed in their own dtype and the sums in float64."""
    rows: Tensor = torch.linalg.vector_norm(delta, dim=1)
    return rows.double().square().sum()


def _spacings(after: Tensor, target: Target) -> Tensor:
    """Return the sum of the squared distances of each number from the next, in float64."""
    name = target.tuned.spec.dtype
    precision = PRECISIONS[name]
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[after.dtype.itemsize]
    stored = name if torch_dtype(name) == after.dtype else "F32"  # what was decoded is wider
    powers = (after.view(words) & EXPONENTS[stored]).view(after.dtype).double()
    powers = powers.clamp(min=precision.smallest)
    # Infinities and NaN have no neighbours.
    return powers.where(powers.isfinite(), 0.0).square().sum() * precision.eps**2


def _is_out_of_memory(error: RuntimeError) -> bool:
    is_named = isinstance(error, torch.cuda.OutOfMemoryError | NeedsAllRowsError)
    return is_named or any(word in str(error) for word in OUT_OF_MEMORY)
