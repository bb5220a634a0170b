"""Files that are read in ranges over a network: few requests, and nothing twice that is small."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Final

from loratool.errors import FileFormatError
from loratool.files.checkpoint import SHARD
from loratool.files.sources import AT_ONCE

__all__ = ["Ranged"]

FIRST_BYTES: Final = 256 << 10
"""What is read of a file first; few headers of adapters are longer."""
SHARD_BYTES: Final = 32 << 10
"""The same for one of several files of a model, each of which describes few tensors."""
MOST_BYTES: Final = 32 << 20
"""What one request asks for at most."""


class Ranged:
    """The bytes of one file, with its beginning and what was read last kept in memory.

    Attributes:
        is_ranged: Whether data are read in ranges too.
        mark: See :class:`Source`.

    Args:
        name: What it is called in messages.
        path: What it is called among those that it lies with.
        size: Its size in bytes.
        others: Files that it lies with, itself among them, by their paths.
    """

    is_ranged = False
    mark = 0

    def __init__(self, name: str, path: str, size: int, others: Mapping[str, Ranged]) -> None:
        self.name = name
        self.path = path
        self.size = size
        self.local: Path | None = None
        self._others = others
        self._is_begun = False
        self._first = SHARD_BYTES if SHARD.fullmatch(path) else FIRST_BYTES
        self._head = b""
        self._last: tuple[int, bytes | memoryview] = (0, b"")
        self._lock = Lock()

    def get(self, start: int, stop: int) -> bytes | memoryview:
        """Fetch the bytes from ``start`` to ``stop``, all of them.

        Raises:
            LoratoolError: They cannot be fetched.
        """
        raise NotImplementedError

    def check_unchanged(self) -> None:
        """Do nothing: it cannot change."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on; the beginnings of a model's files are read at once.

        Raises:
            FileFormatError: It has not as many bytes.
            LoratoolError: It cannot be read.
        """
        if offset < 0 or offset + len(view) > self.size:
            raise FileFormatError(self.name, "is shorter than it says")
        if self.local is not None:
            with self.local.open("rb") as file:
                file.seek(offset)
                view[:] = file.read(len(view))
            return
        if not self._is_begun:
            self._begin()
        if len(view) >= MOST_BYTES:
            for start in range(0, len(view), MOST_BYTES):
                part = view[start : start + MOST_BYTES]
                part[:] = self.get(offset + start, offset + start + len(part))
            return
        with self._lock:
            view[:] = self._read(offset, offset + len(view))

    def _begin(self) -> None:
        """Have the beginnings of the files in memory that are parts of one model with it."""
        self._is_begun = True
        match = SHARD.fullmatch(self.path)
        if match is None:
            return
        matches = ((SHARD.fullmatch(path), each) for path, each in self._others.items())
        found = [each for m, each in matches if m and (m[1], m[3]) == (match[1], match[3])]
        for each in found:
            each._is_begun = True
        if len(found) > 1:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(Ranged._read_head, found))

    def _read_head(self) -> None:
        with self._lock:
            self._read(0, min(1, self.size))

    def _read(self, start: int, stop: int) -> bytes | memoryview:
        if stop <= len(self._head):
            return self._head[start:stop]
        if start <= len(self._head):
            # A header that goes on: twice as much, so that a long one takes few requests.
            end = min(self.size, max(stop, self._first, 2 * len(self._head)))
            self._head += self.get(len(self._head), end)
            return self._head[start:stop]
        begin, data = self._last
        if not (begin <= start and stop <= begin + len(data)):
            # Such as the directory at the end of an archive, with what lies before it.
            begin = min(start, max(len(self._head), self.size - FIRST_BYTES))
            data = self.get(begin, min(self.size, max(stop, begin + self._first)))
            self._last = begin, data
        return data[start - begin : stop - begin]
