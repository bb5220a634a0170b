"""A stored tensor as a matrix, read by blocks of rows, in bytes."""

from __future__ import annotations

from loratool.files.container import read_view
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor
from loratool.files.transfer import read_into

__all__ = ["RowBytes"]


class RowBytes:
    """A stored tensor seen as a matrix of ``width`` columns.

    Args:
        stored: The tensor. If it is not contiguous it is read as a whole.
        width: Number of columns; its elements are a multiple of it.
        files: Where the descriptor comes from.
    """

    def __init__(self, stored: StoredTensor, width: int, files: InputFiles) -> None:
        self.stored = stored
        self.width = width
        self.row_bytes = DTYPES[stored.spec.dtype].size(width)
        self._files = files
        self._whole = read_view(stored) if not stored.is_run else None
        files.expect(*stored.extents)

    @property
    def dtype(self) -> str:
        """What a header calls the elements."""
        return self.stored.spec.dtype

    def values(self, start: int, rows: int, *, is_double: bool) -> None:
        """Leave it to :meth:`read`, whose bytes somebody else makes numbers."""

    def read(self, start: int, rows: int, buffer: memoryview | None = None) -> memoryview:
        """Return the bytes of rows ``start`` to ``start + rows``.

        Args:
            start: The first row.
            rows: How many.
            buffer: Memory of at least that size to read into; by default new one.

        Raises:
            FileFormatError: The file ended early, or is not the one that it was.
        """
        size, offset = rows * self.row_bytes, start * self.row_bytes
        if self._whole is not None:
            return self._whole[offset : offset + size]
        view = memoryview(bytearray(size)) if buffer is None else buffer[:size]
        path, place = self.stored.path, self.stored.offset + offset
        with self._files.using(path) as descriptor:
            read_into(descriptor, view, place, path=path)
        return view
