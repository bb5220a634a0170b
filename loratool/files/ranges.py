"""Files that are read in ranges over a network: few requests, and nothing twice that is small."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Final

from loratool.errors import FileFormatError

__all__ = ["FIRST_BYTES", "SHARD_BYTES", "Ranged"]

FIRST_BYTES: Final = 256 << 10
"""What is read of a file first; few headers of adapters are longer."""
SHARD_BYTES: Final = 32 << 10
"""The same for one of several files of a model, each of which describes few tensors."""
MOST_BYTES: Final = 32 << 20
"""What one request asks for at most."""


class Ranged:
    """The bytes of one file, with its beginning and what was read last kept in memory.

    Args:
        name: What it is called in messages.
        size: Its size in bytes.
        first: How many bytes of it are read first.
    """

    def __init__(self, name: str, size: int, first: int = FIRST_BYTES) -> None:
        self.name = name
        self.size = size
        self.local: Path | None = None
        self._first = first
        self._head = b""
        self._last = (0, b"")
        self._lock = Lock()

    def get(self, start: int, stop: int) -> bytes:
        """Fetch the bytes from ``start`` to ``stop``, all of them.

        Raises:
            LoratoolError: They cannot be fetched.
        """
        raise NotImplementedError

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on.

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
        if len(view) >= MOST_BYTES:
            for start in range(0, len(view), MOST_BYTES):
                part = view[start : start + MOST_BYTES]
                part[:] = self.get(offset + start, offset + start + len(part))
            return
        with self._lock:
            view[:] = self._read(offset, offset + len(view))

    def read_head(self) -> None:
        """Have the beginning of it in memory."""
        with self._lock:
            self._read(0, min(1, self.size))

    def _read(self, start: int, stop: int) -> bytes:
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
