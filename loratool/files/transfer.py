"""Move bytes between files at given offsets, completely or with an error."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from loratool.errors import (
    FileFormatError,
    FullDiskError,
    OutputDeniedError,
    OutputError,
    unreadable,
)

__all__ = [
    "Readable",
    "clone_file",
    "copy_range",
    "describe_write_error",
    "read_into",
    "write_all",
]

FICLONE: Final = 0x40049409
CHUNK: Final = 8 << 20
NO_ROOM: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class Elsewhere(Protocol):
    """A file that is not on this disk."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on.

        Raises:
            LoratoolError: It cannot be read.
        """
        ...


Readable: TypeAlias = int | Elsewhere
"""What bytes are read from: a descriptor, or a file that is elsewhere."""


def clone_file(source: Readable, target: int) -> bool:
    """Make ``target`` share all extents of ``source``, where the file system can."""
    if not isinstance(source, int):
        return False
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError:
        return False
    return True


def copy_range(
    source: Readable, target: int, source_offset: int, target_offset: int, size: int, *, path: Path
) -> None:
    """Copy ``size`` bytes, inside the kernel where it can.

    Raises:
        FileFormatError: The source ended early.
        OSError: Reading or writing failed.
    """
    while size:
        if not isinstance(source, int):
            _copy_through_memory(source, target, source_offset, target_offset, size, path)
            return
        try:
            moved = os.copy_file_range(
                source, target, min(size, 1 << 30), source_offset, target_offset
            )
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            # The kernel cannot, or one of the two files fails: this way it is clear which.
            _copy_through_memory(source, target, source_offset, target_offset, size, path)
            return
        if moved == 0:
            raise FileFormatError(path, "became shorter while it was read")
        source_offset += moved
        target_offset += moved
        size -= moved


def _copy_through_memory(
    source: Readable, target: int, source_offset: int, target_offset: int, size: int, path: Path
) -> None:
    buffer = memoryview(bytearray(min(size, CHUNK)))
    while size:
        view = buffer[: min(size, CHUNK)]
        read_into(source, view, source_offset, path=path)
        write_all(target, view, target_offset)
        source_offset += len(view)
        target_offset += len(view)
        size -= len(view)


def read_into(source: Readable, view: memoryview, offset: int, *, path: Path) -> None:
    """Fill ``view`` from ``offset`` on.

    Raises:
        FileFormatError: The file ended early, or could not be read.
        LoratoolError: It is elsewhere, and cannot be had.
    """
    if not isinstance(source, int):
        source.read_into(view, offset)
        return
    while len(view):
        try:
            count = os.preadv(source, [view], offset)
        except OSError as error:
            raise unreadable(path, error) from None
        if count == 0:
            raise FileFormatError(path, "became shorter while it was read")
        view = view[count:]
        offset += count


def write_all(target: int, view: memoryview, offset: int) -> None:
    """Write all of ``view`` at ``offset``.

    Raises:
        OSError: Writing failed, such as for want of space.
    """
    while len(view):
        count = os.pwrite(target, view, offset)
        view = view[count:]
        offset += count


def describe_write_error(path: Path, error: OSError) -> OutputError:
    """Return the error that tells a user why ``path`` could not be written."""
    what = f"cannot be written: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space, or choose another disk"
        return FullDiskError(path, what, hint=hint, number=error.errno)
    if isinstance(error, PermissionError):
        return OutputDeniedError(path, what, number=error.errno)
    if error.errno == errno.EEXIST and error.filename:
        name = os.path.basename(error.filename)  # noqa: PTH119 - bytes too
        what = f"cannot be written: this disk takes {name!r} and another of its files for one"
        return OutputError(path, what, hint="choose a disk that tells upper case from lower case")
    return OutputError(path, what)
