"""Input files that stay open, and unchanged from the reading of their headers on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from loratool.errors import FileFormatError

__all__ = ["InputFiles", "Stamp", "stamp_of"]


class Stamp(NamedTuple):
    """What tells whether a file is still the one that it was."""

    device: int
    inode: int
    size: int
    modified: int


def stamp_of(file: int | Path) -> Stamp:
    """Return the stamp of a file, open or by its path."""
    status = os.stat(file)  # noqa: PTH116 - descriptors too
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class InputFiles:
    """Open descriptors of the files that a run reads.

    Args:
        stamps: What the files were when their headers were read.
    """

    def __init__(self, stamps: Mapping[Path, Stamp]) -> None:
        self._stamps = dict(stamps)
        self._open: dict[Path, int] = {}
        self._lock = Lock()

    def descriptor(self, path: Path) -> int:
        """Return a descriptor of ``path``, opened once.

        Raises:
            FileFormatError: It cannot be opened any more, or is not the file that it was.
        """
        with self._lock:
            if path not in self._open:
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise FileFormatError(path, f"cannot be read: {error.strerror}") from None
                self._open[path] = descriptor
                self._check(path, descriptor)
            return self._open[path]

    def check_unchanged(self) -> None:
        """Make sure that no file was written to or exchanged in the meantime.

        Raises:
            FileFormatError: One was.
        """
        for path, descriptor in self._open.items():
            self._check(path, descriptor)
            try:
                named = stamp_of(path)
            except OSError:
                raise FileFormatError(path, "vanished while it was read") from None
            if named != self._stamps[path]:
                raise FileFormatError(path, "was exchanged while it was read")

    def _check(self, path: Path, descriptor: int) -> None:
        stamp = stamp_of(descriptor)
        if self._stamps.setdefault(path, stamp) != stamp:
            raise FileFormatError(path, "was changed while it was read")

    def close(self) -> None:
        """Close every descriptor."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
