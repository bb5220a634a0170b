"""A weight as whoever computes with it sees it: rows of numbers, however they are stored."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from loratool.codecs.codec import CodedTensor
from loratool.files.inputs import InputFiles
from loratool.files.rows import RowBytes
from loratool.files.spec import StoredTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "PaddedRows",
    "RowSource",
    "Weight",
    "is_alias",
    "path_of",
    "read_matrix",
    "rows_of",
    "stored_tensors",
]

Weight: TypeAlias = StoredTensor | CodedTensor
"""A tensor of a model: stored as it is, or coded in several."""


class RowSource(Protocol):
    """A weight as a matrix, read by blocks of rows.

    Attributes:
        width: Its columns.
        row_bytes: Bytes of one row as it is returned.
    """

    width: int
    row_bytes: int

    @property
    def dtype(self) -> str:
        """What a header calls the numbers that are returned."""
        ...

    def read(self, start: int, rows: int, buffer: memoryview | None = None) -> memoryview:
        """Return rows from ``start`` on, in ``buffer`` where there is one."""
        ...

    def values(self, start: int, rows: int, *, is_double: bool) -> NDArray[Any] | None:
        """Return rows from ``start`` on as new numbers, where that is quicker than their bytes."""
        ...


class CodedRows:
    """RowSource of a coded weight, decoded to float32.

    Args:
        coded: The weight.
        width: Number of columns; its elements are a multiple of it.
        files: Where descriptors come from.
    """

    def __init__(self, coded: CodedTensor, width: int, files: InputFiles) -> None:
        self.coded = coded
        self.width = width
        self.row_bytes = 4 * width
        from loratool.codecs.parts import FileParts

        self._parts = FileParts(coded.parts, files)

    @property
    def dtype(self) -> str:
        """What a header calls the numbers that are returned."""
        return "F32"

    def values(self, start: int, rows: int, *, is_double: bool = True) -> NDArray[Any]:
        """Return rows from ``start`` on as new numbers, ``(rows, width)``."""
        import numpy as np

        whole, kind = self.coded.width, np.float64 if is_double else np.float32
        first, last = start * self.width, (start + rows) * self.width
        row, end = first // whole, -(-last // whole)
        found = self.coded.codec.decode_rows(self.coded, row, end, self._parts, kind)
        cut = found.reshape(-1)[first - row * whole : last - row * whole]
        return cut.reshape(rows, self.width)

    def read(self, start: int, rows: int, buffer: memoryview | None = None) -> memoryview:
        """Return rows from ``start`` on as the bytes of float32 numbers."""
        import numpy as np

        wanted = np.ascontiguousarray(self.values(start, rows, is_double=False))
        data: memoryview = wanted.reshape(-1).view(np.uint8).data
        if buffer is None:
            return data
        view = buffer[: data.nbytes]
        view[:] = data
        return view


class PaddedRows:
    """RowSource of a weight that is the beginning of a larger one, zero elsewhere.

    Args:
        reader: Reads its rows.
        rows: How many it has.
        width: Columns of the larger one; what lies beyond its own is zero.
    """

    def __init__(self, reader: RowSource, rows: int, width: int) -> None:
        self._reader = reader
        self._rows = rows
        self.width = width
        self.row_bytes = reader.row_bytes // reader.width * width

    @property
    def dtype(self) -> str:
        """What a header calls the numbers that are returned."""
        return self._reader.dtype

    def values(self, start: int, rows: int, *, is_double: bool) -> None:
        """Leave it to :meth:`read`."""

    def read(self, start: int, rows: int, buffer: memoryview | None = None) -> memoryview:
        """Return rows from ``start`` on."""
        import numpy as np

        view = memoryview(bytearray(rows * self.row_bytes)) if buffer is None else buffer
        view = view[: rows * self.row_bytes]
        whole = np.frombuffer(view, np.uint8).reshape(rows, self.row_bytes)
        whole[:] = 0
        count = min(rows, self._rows - start)
        if count > 0:
            own = self._reader.row_bytes
            data = np.frombuffer(self._reader.read(start, count), np.uint8)
            whole[:count, :own] = data.reshape(count, own)
        return view


def rows_of(weight: Weight, width: int, files: InputFiles) -> RowSource:
    """Return what reads ``weight`` as a matrix of ``width`` columns."""
    if isinstance(weight, CodedTensor):
        return CodedRows(weight, width, files)
    return RowBytes(weight, width, files)


def read_matrix(weight: Weight, files: InputFiles) -> NDArray[np.float64]:
    """Return a whole weight in float64, exactly, with its shape."""
    import numpy as np

    from loratool.codecs import numbers

    shape = weight.spec.shape
    if not weight.spec.elements:
        return np.empty(shape)
    if isinstance(weight, CodedTensor):
        reader = CodedRows(weight, weight.width, files)
        return reader.values(0, weight.rows).reshape(shape)
    data = RowBytes(weight, weight.spec.elements, files).read(0, 1)
    return numbers.decode(data, weight.spec.dtype, shape)


def stored_tensors(weight: Weight) -> Collection[StoredTensor]:
    """Return the tensors of files that a weight is made of."""
    return weight.parts.values() if isinstance(weight, CodedTensor) else (weight,)


def path_of(weight: Weight) -> Path:
    """Return the file that holds a weight, or the codes of one."""
    if isinstance(weight, CodedTensor):
        return next(iter(weight.parts.values())).path
    return weight.path


def is_alias(weight: Weight) -> bool:
    """Whether its bytes are those of another tensor."""
    return isinstance(weight, StoredTensor) and weight.alias_of is not None
