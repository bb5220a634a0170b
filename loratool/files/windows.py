"""Data of files that are elsewhere: a few large requests, several at a time, some ahead.

Whoever reads says beforehand which bytes, in order. Neighbours become one request, a *window*;
when one is read those after it are on their way. What is read again soon is still there, as long
as the memory for all of them lasts.
"""

from __future__ import annotations

from bisect import bisect_right
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Final
from weakref import WeakSet

from loratool.files.sources import AT_ONCE, Source

__all__ = ["Far", "Windows"]

WINDOW_BYTES: Final = 8 << 20
"""What one request asks for at most."""
AHEAD_BYTES: Final = AT_ONCE * WINDOW_BYTES
"""What all windows take of memory, as long as nothing is asked for but ahead."""
MOST_BYTES: Final = 2 * AHEAD_BYTES
"""What they take at most, with what several threads wait for."""
_in_use: WeakSet[Windows] = WeakSet()
"""All of them; where there are several, as for what is compared, each takes its share."""
GAP_BYTES: Final = 4096
"""Bytes between two ranges that are read with them: what files are filled up with."""


@dataclass(slots=True)
class _Window:
    """Bytes of a file that one request asks for.

    Attributes:
        source: The file.
        start: Where they begin.
        stop: Where they end.
        place: Which of all windows it is, in the order of reading.
        data: They, or what will bring them; ``None`` before, and once they are forgotten.
        left: How many of them nobody has read.
        passes: How often all of them were read.
        used: When they were read last, in reads of any window.
    """

    source: Source
    start: int
    stop: int
    place: int
    data: Future[bytes | memoryview] | None = None
    left: int = 0
    passes: int = 0
    used: int = 0

    @property
    def size(self) -> int:
        return self.stop - self.start


class Windows:
    """What is read of all files in a run. Safe to use from several threads."""

    def __init__(self) -> None:
        _in_use.add(self)
        self._order: list[_Window] = []
        self._files: dict[int, list[_Window]] = {}  # by the source, in the order of its bytes
        self._held: dict[int, _Window] = {}  # by place: those in memory, or on their way
        self._clock = 0
        self._lock = Lock()
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._order)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(window.size for window in self._order)

    def expect(self, *extents: tuple[Source, int, int]) -> None:
        """Note what will be read side by side, after what was noted before.

        Args:
            extents: Each a file, where bytes begin in it, and how many.
        """
        turns = max((-(-size // WINDOW_BYTES) for _, _, size in extents), default=0)
        with self._lock:
            for turn in range(turns):
                for source, start, size in extents:
                    first, last = (size * each // turns for each in (turn, turn + 1))
                    self._expect(source, start + first, start + last)

    def _expect(self, source: Source, start: int, stop: int) -> None:
        known = self._files.setdefault(id(source), [])
        place = bisect_right(known, start, key=lambda window: window.start)
        if place:
            start = max(start, known[place - 1].stop)
        while start < stop:
            following = known[place] if place < len(known) else None
            end = min(stop, following.start) if following else stop
            if start < end:
                place = self._add(known, place, source, start, end)
            if following is None:
                return
            start, place = following.stop, place + 1

    def _add(self, known: list[_Window], place: int, source: Source, start: int, stop: int) -> int:
        """Note bytes that no window has, and return the place after them among ``known``."""
        last = known[place - 1] if place else None
        if (
            last is not None
            and last is self._order[-1]
            and last.data is None
            and start - last.stop <= GAP_BYTES
            and last.size < WINDOW_BYTES
        ):
            last.stop = min(stop, last.start + WINDOW_BYTES)
            start = last.stop
        while start < stop:
            end = min(stop, start + WINDOW_BYTES)
            window = _Window(source, start, end, len(self._order))
            self._order.append(window)
            known.insert(place, window)
            start, place = end, place + 1
        return place

    def read_into(self, source: Source, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on.

        Raises:
            LoratoolError: It cannot be read.
        """
        while len(view):
            window, stop = self._at(source, offset, offset + len(view))
            if window is None:
                data = memoryview(source.get(offset, stop))
            else:
                stop = min(window.stop, stop)
                data = self._data(window)[offset - window.start : stop - window.start]
            view[: stop - offset] = data
            if window is not None:
                with self._lock:
                    window.left -= stop - offset
                    window.passes += window.left == 0
            view, offset = view[stop - offset :], stop

    def _at(self, source: Source, offset: int, stop: int) -> tuple[_Window | None, int]:
        """Return the window that has a byte; where none has, up to where that is so."""
        with self._lock:
            known = self._files.get(id(source), [])
            place = bisect_right(known, offset, key=lambda window: window.start)
            if place and offset < known[place - 1].stop:
                return known[place - 1], stop
            end = known[place].start if place < len(known) else stop
            return None, min(stop, end, offset + WINDOW_BYTES)

    def _data(self, window: _Window) -> memoryview:
        with self._lock:
            self._clock += 1
            window.used = self._clock
            if window.data is None:
                if not self._make_room(window.size, AHEAD_BYTES, only_read=True):
                    self._make_room(window.size, MOST_BYTES, only_read=False)
                self._ask(window)
            future = window.data
            self._ask_ahead(window)
        assert future is not None
        try:
            return memoryview(future.result())
        except BaseException:
            with self._lock:
                self._forget(window)
            raise

    def _ask_ahead(self, window: _Window) -> None:
        """Ask for the windows after one, as many as may be on their way at a time.

        Those that have been read more often than it, by another thread, are behind and not ahead.
        """
        on_way = sum(1 for each in self._held.values() if each.data and not each.data.done())
        for each in self._order[window.place + 1 : window.place + 1 + AT_ONCE]:
            if on_way >= AT_ONCE:
                return
            if each.data is None and each.passes <= window.passes:
                if not self._make_room(each.size, AHEAD_BYTES, only_read=True):
                    return
                self._ask(each)
                on_way += 1

    def _ask(self, window: _Window) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(AT_ONCE, "loratool-read")
        window.data = self._pool.submit(window.source.get, window.start, window.stop)
        window.left = window.size
        self._held[window.place] = window

    def _make_room(self, size: int, most: int, *, only_read: bool) -> bool:
        """Forget what was read longest ago, until there is room; return whether there is.

        Args:
            size: For how many bytes.
            most: Of how many in all.
            only_read: Whether what nobody has read yet is kept.
        """
        room = most // max(1, len(_in_use)) - size - sum(each.size for each in self._held.values())
        if room >= 0:
            return True
        there = (each for each in self._held.values() if each.data and each.data.done())
        for each in sorted(there, key=lambda each: (each.left > 0, each.used)):
            if room >= 0 or (each.left > 0 and only_read):
                break
            self._forget(each)
            room += each.size
        return room >= 0

    def _forget(self, window: _Window) -> None:
        window.data = None
        self._held.pop(window.place, None)

    def close(self) -> None:
        """Forget everything, and wait for what is on its way."""
        _in_use.discard(self)
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        with self._lock:
            for window in tuple(self._held.values()):
                self._forget(window)


@dataclass(frozen=True, slots=True)
class Far:
    """A file that is read through windows, where one of the disk is read by its descriptor."""

    windows: Windows
    source: Source

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on.

        Raises:
            LoratoolError: It cannot be read.
        """
        self.windows.read_into(self.source, view, offset)
