"""One object that is put together of parts, in any order, by any number of threads."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock, Semaphore

from loratool.errors import LoratoolError
from loratool.files.objects.bucket import Bucket
from loratool.files.objects.parts import LONGEST, Part
from loratool.files.objects.store import ObjectFile
from loratool.files.sources import AT_ONCE

__all__ = ["Sender", "Upload", "whole_of"]


class Sender:
    """Requests that are on their way, a few at a time; whoever has more to send waits."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE, "loratool-send")
        self._slots = Semaphore(AT_ONCE)
        self._failure: BaseException | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Have ``work`` done once there is a place for it.

        Raises:
            LoratoolError: Something that was handed over before has failed.
        """
        self._slots.acquire()
        if self._failure is not None:
            self._slots.release()
            raise self._failure
        self._pool.submit(self._do, work)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            if self._failure is None:
                work()
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            self._slots.release()

    def wait(self) -> None:
        """Wait until all is done.

        Raises:
            LoratoolError: Something has failed.
        """
        for _ in range(AT_ONCE):
            self._slots.acquire()
        self._slots.release(AT_ONCE)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Leave off what is not on its way, and wait for what is."""
        self._failure = self._failure or RuntimeError("the sender is closed")
        self._pool.shutdown()


@dataclass(slots=True)
class _Open:
    """A part of which some bytes are there.

    Attributes:
        data: All of its bytes.
        left: How many of those that are computed are not there yet.
        is_filled: Whether those that are not computed are there.
        lock: Held by who writes.
    """

    data: bytearray
    left: int
    is_filled: bool = False
    lock: Lock = field(default_factory=Lock)


def whole_of(parts: Sequence[Part]) -> ObjectFile | None:
    """Return what an object equals, where that is another one which one request can copy."""
    kept = [part.kept for part in parts if part.kept is not None]
    source = kept[0].source if kept else None
    if not isinstance(source, ObjectFile) or len(kept) < len(parts):
        return None
    is_one = all(each.source is source and each.offset == each.start for each in kept)
    return source if is_one and kept[-1].stop == source.size <= LONGEST else None


class Upload:
    """One object. Nothing of it can be seen until it is complete.

    Attributes:
        key: What it is called.
        parts: Its parts.
        whole: The object that it equals, where one request can copy that.

    Args:
        bucket: Where it goes.
        key: What it is called there.
        parts: Its parts; sources of those that are copied are files of a store.
        fill: Puts into memory the bytes from an offset on that nobody will write.
        written: Where bytes begin and end that somebody will write, in order.
    """

    def __init__(
        self,
        bucket: Bucket,
        key: str,
        parts: Sequence[Part],
        fill: Callable[[int, memoryview], None],
        written: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.key = key
        self.parts = parts
        self._bucket = bucket
        self._fill = fill
        self.whole = whole_of(parts)
        self._starts = [part.start for part in parts]
        self._left = self._awaited(written)
        self._open: dict[int, _Open] = {}
        self._tags: dict[int, str] = {}
        self._lock = Lock()
        self._upload: str | None = None

    def _awaited(self, written: Iterable[tuple[int, int]]) -> list[int]:
        left = [0] * len(self.parts)
        for start, stop in written:
            index = bisect_right(self._starts, start) - 1
            while start < stop:
                end = min(stop, self.parts[index].stop)
                left[index] += end - start
                start, index = end, index + 1
        return left

    @property
    def ready(self) -> list[int]:
        """The parts of which nobody will write any byte."""
        return [index for index, left in enumerate(self._left) if not left]

    def do(self, index: int, sender: Sender) -> None:
        """Have one of the parts that are ready copied or sent."""
        part = self.parts[index]
        if self.whole is not None:
            return  # it is copied in the end
        if part.kept is not None:
            sender.submit(lambda: self._copy(index))
            return
        data = bytearray(part.size)
        self._fill(part.start, memoryview(data))
        sender.submit(lambda: self._send(index, data))

    def write(self, offset: int, data: memoryview, sender: Sender) -> None:
        """Take computed bytes; parts that are full are sent."""
        index = bisect_right(self._starts, offset) - 1
        while len(data):
            part = self.parts[index]
            piece = data[: part.stop - offset]
            with self._lock:
                opened = self._open.get(index)
                if opened is None:
                    opened = self._open[index] = _Open(bytearray(part.size), self._left[index])
            with opened.lock:
                if not opened.is_filled:
                    self._fill(part.start, memoryview(opened.data))
                    opened.is_filled = True
                begin = offset - part.start
                opened.data[begin : begin + len(piece)] = piece
                opened.left -= len(piece)
                is_full = opened.left == 0
            if is_full:
                with self._lock:
                    del self._open[index]
                self._submit(index, opened.data, sender)
            data, offset, index = data[len(piece) :], offset + len(piece), index + 1

    def _submit(self, index: int, data: bytearray, sender: Sender) -> None:
        sender.submit(lambda: self._send(index, data))

    def _begun(self) -> str:
        with self._lock:
            if self._upload is None:
                self._upload = self._bucket.begin(self.key)
            return self._upload

    def _send(self, index: int, data: bytearray) -> None:
        self._tags[index] = self._bucket.send_part(self.key, self._begun(), index + 1, data)

    def _copy(self, index: int) -> None:
        kept = self.parts[index].kept
        assert kept is not None and isinstance(kept.source, ObjectFile)
        begin, end = kept.offset, kept.offset + kept.size
        upload = self._begun()
        self._tags[index] = self._bucket.copy_part(
            self.key, upload, index + 1, kept.source, begin, end
        )

    def complete(self, *, is_new: bool) -> None:
        """Let the object appear.

        Raises:
            OutputExistsError: ``is_new``, and there is one already.
            StoreError: The store does not make it.
        """
        if self.whole is not None:
            self._bucket.copy(self.key, self.whole, is_new=is_new)
            return
        tags = [self._tags[index] for index in range(len(self.parts))]
        self._bucket.complete(self.key, self._begun(), tags, is_new=is_new)
        self._upload = None

    def abort(self) -> None:
        """Drop what was sent, as far as that goes."""
        if self._upload is not None:
            with suppress(LoratoolError):
                self._bucket.abort(self.key, self._upload)
            self._upload = None
