"""A stored tensor as a matrix, read by blocks of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loratool.codecs import numbers
from loratool.files.container import read_bytes
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor
from loratool.files.transfer import read_into

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["StoredRows"]


class StoredRows:
    """A stored tensor seen as a matrix of ``width`` columns.

    Args:
        stored: The tensor.
        width: Number of columns; its elements are a multiple of it.
        files: Where the descriptor comes from.
    """

    def __init__(self, stored: StoredTensor, width: int, files: InputFiles) -> None:
        self.dtype = stored.spec.dtype
        self.width = width
        self._stored = stored
        self._row_bytes = width * stored.spec.nbytes // max(1, stored.spec.elements)
        self._whole = read_bytes(stored) if stored.strides is not None else None
        self._files = files

    def rows(self, start: int, count: int, kind: DTypeLike = np.float32) -> NDArray[Any]:
        """Return rows ``start`` to ``start + count`` as numbers, ``(count, width)``."""
        begin, size = start * self._row_bytes, count * self._row_bytes
        if self._whole is not None:
            data = memoryview(self._whole)[begin : begin + size]
        else:
            data = memoryview(bytearray(size))
            path = self._stored.path
            read_into(self._files.descriptor(path), data, self._stored.offset + begin, path=path)
        return numbers.decode(data, self.dtype, (count, self.width), kind)
