"""Input files that are unchanged from the reading of their headers on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Final, NamedTuple

from loratool.errors import FileFormatError, unreadable
from loratool.files.descriptors import Descriptors
from loratool.files.sources import fetch, size_of_opened, whole

__all__ = ["InputFiles", "Stamp", "stamp_of"]


ELSEWHERE: Final = -1
"""The device of a file that is not on the disk, and does not change."""


class Stamp(NamedTuple):
    """What tells whether a file is still the one that it was."""

    device: int
    inode: int
    size: int
    modified: int

    def fits(self, other: Stamp) -> bool:
        """Whether both may be of one file, which one of them may have found elsewhere."""
        if ELSEWHERE in (self.device, other.device):
            return self.size == other.size
        return self == other


def stamp_of(file: int | Path | BinaryIO) -> Stamp:
    """Return the stamp of a file, open or by its path."""
    if not isinstance(file, int | Path):
        size = size_of_opened(file)
        if size is not None:
            return Stamp(ELSEWHERE, 0, size, 0)
        file = file.fileno()
    status = os.stat(file)  # noqa: PTH116 - descriptors too
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class InputFiles:
    """The files that a run reads, each checked whenever it is opened or closed.

    Args:
        stamps: What the files were when their headers were read.
    """

    def __init__(self, stamps: Mapping[Path, Stamp]) -> None:
        self._stamps = dict(stamps)
        self._pinned: dict[Path, int] = {}
        self._pins = ExitStack()
        self._lock = Lock()
        self._descriptors = Descriptors(self._open, self._check)

    def using(self, path: Path) -> AbstractContextManager[int]:
        """Give a descriptor of ``path`` for a while; few are open at a time.

        Raises:
            FileFormatError: It cannot be opened any more, or is not the file that it was.
        """
        return self._descriptors.using(path)

    def descriptor(self, path: Path) -> int:
        """Return a descriptor of ``path`` that stays open until the end.

        Raises:
            FileFormatError: It cannot be opened any more, or is not the file that it was.
        """
        with self._lock:
            if path not in self._pinned:
                self._pinned[path] = self._pins.enter_context(self.using(path))
            return self._pinned[path]

    def check_unchanged(self) -> None:
        """Make sure that no file was written to or exchanged since its header was read.

        Raises:
            FileFormatError: One was.
        """
        for path, stamp in self._stamps.items():
            if stamp.device == ELSEWHERE:
                continue
            try:
                named = stamp_of(whole(path))
            except OSError:
                raise FileFormatError(path, "vanished while it was read") from None
            if named[:2] != stamp[:2]:
                raise FileFormatError(path, "was exchanged while it was read")
            if named != stamp:
                raise FileFormatError(path, "was changed while it was read")

    def _open(self, path: Path) -> int:
        fetch((path, *self._stamps))
        try:
            descriptor = os.open(whole(path), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(path, error) from None
        try:
            self._check(path, descriptor)
        except FileFormatError:
            os.close(descriptor)
            raise
        return descriptor

    def _check(self, path: Path, descriptor: int) -> None:
        stamp = stamp_of(descriptor)
        if not self._stamps.setdefault(path, stamp).fits(stamp):
            raise FileFormatError(path, "was changed while it was read")

    def close(self) -> None:
        """Close every descriptor."""
        self._pins.close()
        self._pinned.clear()
        self._descriptors.close()
