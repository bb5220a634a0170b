"""A tensor of a model as a matrix of numbers, read by blocks of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loratool.codecs import numbers
from loratool.codecs.weights import Weight, rows_of
from loratool.files.inputs import InputFiles

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["StoredRows"]


class StoredRows:
    """A tensor seen as a matrix of ``width`` columns; one that is coded is decoded.

    Args:
        weight: The tensor.
        width: Number of columns; its elements are a multiple of it.
        files: Where descriptors come from.
    """

    def __init__(self, weight: Weight, width: int, files: InputFiles) -> None:
        self._source = rows_of(weight, width, files)

    @property
    def dtype(self) -> str:
        """What a header calls the numbers."""
        return self._source.dtype

    def rows(self, start: int, count: int, kind: DTypeLike = np.float32) -> NDArray[Any]:
        """Return rows ``start`` to ``start + count`` as numbers, ``(count, width)``."""
        values = self._source.values(start, count, is_double=np.dtype(kind) == np.float64)
        if values is not None:
            return values
        shape = (count, self._source.width)
        return numbers.decode(self._source.read(start, count), self.dtype, shape, kind)
