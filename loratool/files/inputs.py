"""Input files that are unchanged from the reading of their headers on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, TypeAlias

from loratool.errors import FileFormatError, unreadable
from loratool.files.descriptors import Descriptors
from loratool.files.sources import (
    Source,
    check_unchanged,
    fetch_unranged,
    ranged,
    source_of_opened,
    whole,
)
from loratool.files.transfer import Readable

if TYPE_CHECKING:
    from loratool.files.windows import Windows

__all__ = ["Extent", "InputFiles", "Stamp", "stamp_of"]

Extent: TypeAlias = tuple[Path, int, int]
"""Bytes of a file: which, where they begin, how many."""

ELSEWHERE: Final = -1
"""The device of a file that is not on the disk; its node is what marks its bytes."""


class Stamp(NamedTuple):
    """What tells whether a file is still the one that it was."""

    device: int
    inode: int
    size: int
    modified: int

    def fits(self, other: Stamp) -> bool:
        """Whether both may be of one file, which one of them may have found elsewhere."""
        if ELSEWHERE in (self.device, other.device):
            marks = self.inode, other.inode
            is_one = self.device != other.device or 0 in marks or self.inode == other.inode
            return is_one and self.size == other.size
        return self == other


def stamp_of(file: int | Path | BinaryIO) -> Stamp:
    """Return the stamp of a file, open or by its path."""
    if not isinstance(file, int | Path):
        source = source_of_opened(file)
        if source is not None:
            return _stamp_of_source(source)
        file = file.fileno()
    status = os.stat(file)  # noqa: PTH116 - descriptors too
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _stamp_of_source(source: Source) -> Stamp:
    return Stamp(ELSEWHERE, source.mark, source.size, 0)


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
        self._descriptors = Descriptors(self._open, self._check_opened)
        self._windows: Windows | None = None

    def expect(self, *extents: Extent) -> None:
        """Note what will be read side by side, after what was noted before.

        Of files that are elsewhere, neighbours are then one request, made ahead of time.

        Args:
            extents: Each a file, where bytes begin in it, and how many.
        """
        far = [
            (source, start, size)
            for path, start, size in extents
            if (source := ranged(path)) is not None
        ]
        if far:
            self._of_sources().expect(*far)

    def using(self, path: Path) -> AbstractContextManager[Readable]:
        """Give what reads ``path`` for a while: a descriptor, of which few are open at a time.

        Raises:
            FileFormatError: It cannot be opened any more, or is not the file that it was.
        """
        source = ranged(path)
        if source is None:
            return self._descriptors.using(path)
        from loratool.files.windows import Far

        self._check(path, _stamp_of_source(source))
        return nullcontext(Far(self._of_sources(), source))

    def _of_sources(self) -> Windows:
        with self._lock:
            if self._windows is None:
                from loratool.files.windows import Windows

                self._windows = Windows()
            return self._windows

    def descriptor(self, path: Path) -> int:
        """Return a descriptor of ``path`` that stays open until the end.

        Raises:
            FileFormatError: It cannot be opened any more, or is not the file that it was.
        """
        with self._lock:
            if path not in self._pinned:
                self._pinned[path] = self._pins.enter_context(self._descriptors.using(path))
            return self._pinned[path]

    def check_unchanged(self) -> None:
        """Make sure that no file was written to or exchanged since its header was read.

        Raises:
            FileFormatError: One was.
        """
        check_unchanged(self._stamps)
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
        fetch_unranged((path, *self._stamps))
        try:
            descriptor = os.open(whole(path), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(path, error) from None
        try:
            self._check_opened(path, descriptor)
        except FileFormatError:
            os.close(descriptor)
            raise
        return descriptor

    def _check_opened(self, path: Path, descriptor: int) -> None:
        self._check(path, stamp_of(descriptor))

    def _check(self, path: Path, stamp: Stamp) -> None:
        if not self._stamps.setdefault(path, stamp).fits(stamp):
            raise FileFormatError(path, "was changed while it was read")

    def close(self) -> None:
        """Close every descriptor."""
        if self._windows is not None:
            self._windows.close()
        self._pins.close()
        self._pinned.clear()
        self._descriptors.close()
