"""Open files, few at a time: a model of a thousand shards is not a thousand descriptors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final

__all__ = ["Descriptors"]

MOST_IDLE: Final = 32


@dataclass
class _Open:
    descriptor: int
    users: int = 0


class Descriptors:
    """Descriptors that are shared by threads and closed once many others were used since.

    Args:
        open_file: Opens a path.
        before_closing: Called with path and descriptor before it is closed on the way.
    """

    def __init__(
        self,
        open_file: Callable[[Path], int],
        before_closing: Callable[[Path, int], None] = lambda path, descriptor: None,
    ) -> None:
        self._open_file = open_file
        self._before_closing = before_closing
        self._files: dict[Path, _Open] = {}  # the one used last comes last
        self._lock = Lock()

    @contextmanager
    def using(self, path: Path) -> Iterator[int]:
        """Give a descriptor of ``path`` that stays open as long as it is used."""
        with self._lock:
            file = self._files.pop(path, None)
            if file is None:
                file = _Open(self._open_file(path))
            self._files[path] = file
            file.users += 1
            self._close_idle()
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.users -= 1

    def _close_idle(self) -> None:
        if len(self._files) <= MOST_IDLE:
            return
        idle = next((path for path, file in self._files.items() if not file.users), None)
        if idle is not None:
            descriptor = self._files.pop(idle).descriptor
            try:
                self._before_closing(idle, descriptor)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """Close every descriptor; nobody uses one any more."""
        with self._lock:
            for file in self._files.values():
                os.close(file.descriptor)
            self._files.clear()
