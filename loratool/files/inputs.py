"""Input files that stay open, and unchanged, while a run reads them."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Lock

from loratool.errors import FileFormatError

__all__ = ["InputFiles"]


class InputFiles:
    """Open descriptors of the files that a run reads, and how they looked at the start."""

    def __init__(self) -> None:
        self._open: dict[Path, tuple[int, tuple[int, int]]] = {}
        self._lock = Lock()

    def descriptor(self, path: Path) -> int:
        """Return a descriptor of ``path``, opened once.

        Raises:
            FileFormatError: It cannot be opened any more.
        """
        with self._lock:
            if path not in self._open:
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise FileFormatError(path, f"cannot be read: {error.strerror}") from None
                self._open[path] = (descriptor, _stamp(descriptor))
            return self._open[path][0]

    def check_unchanged(self) -> None:
        """Make sure that no file was written to since it was opened.

        Raises:
            FileFormatError: One was.
        """
        for path, (descriptor, stamp) in self._open.items():
            if _stamp(descriptor) != stamp:
                raise FileFormatError(path, "was changed while it was read")

    def close(self) -> None:
        """Close every descriptor."""
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return (status.st_size, status.st_mtime_ns)
