"""What blocks of a weight are changed by: products added in place, and norms.

The rest of a change is written with operators that numpy and PyTorch share. These few are not,
because they decide how long a merge takes.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np

from loratool.math.lowrank import is_power_of_two
from loratool.math.namespace import Array

__all__ = ["NumpyProducts", "Products", "TorchProducts", "products_of", "spaced"]

SPACING: Final = 16
"""Elements between rows in memory that BLAS writes to.

Rows whose distance is a power of two fall into the same few places of the cache; OpenBLAS takes
twice as long on them.
"""


class Products(Protocol):
    """Arithmetic of one library; of one thread, for it may hold memory."""

    def add_product(self, block: Array, up: Array, down: Array, scale: float) -> None:
        """Add ``scale · up @ down`` to ``block``, in place.

        A scale that is a power of two commutes with every rounding and costs nothing; any
        other is applied to the product, as PEFT does.
        """
        ...

    def row_norms(self, block: Array) -> Array:
        """Return the norm of each row, ``(rows,)``, in float64."""
        ...

    def column_squares(self, block: Array) -> Array:
        """Return the sum of squares of each column, ``(columns,)``, in float64."""
        ...


class NumpyProducts:
    """numpy's, with memory that is kept from block to block."""

    def __init__(self) -> None:
        self._memory = np.empty(0)

    def add_product(self, block: Array, up: Array, down: Array, scale: float) -> None:
        """See :class:`Products`."""
        if scale != 1 and is_power_of_two(scale):
            up, scale = up * up.dtype.type(scale), 1.0
        product = self._spaced(block.shape, block.dtype)
        np.matmul(up, down, out=product)
        if scale != 1:
            product *= scale
        block += product

    def row_norms(self, block: Array) -> Array:
        """See :class:`Products`."""
        return np.sqrt(np.einsum("ij,ij->i", block, block, dtype=np.float64))

    def column_squares(self, block: Array) -> Array:
        """See :class:`Products`."""
        return np.einsum("ij,ij->j", block, block, dtype=np.float64)

    def _spaced(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        rows, width = shape
        size = rows * (width + SPACING)
        if self._memory.size < size or self._memory.dtype != dtype:
            self._memory = np.empty(size, dtype=dtype)
        return self._memory[:size].reshape(rows, width + SPACING)[:, :width]


class TorchProducts:
    """PyTorch's."""

    def add_product(self, block: Array, up: Array, down: Array, scale: float) -> None:
        """See :class:`Products`."""
        if is_power_of_two(scale):
            block.addmm_(up.mul(scale), down)
        else:
            block.add_(up.mm(down).mul_(scale))

    def row_norms(self, block: Array) -> Array:
        """See :class:`Products`."""
        return block.double().square().sum(dim=1).sqrt()

    def column_squares(self, block: Array) -> Array:
        """See :class:`Products`."""
        return block.double().square().sum(dim=0)


def products_of(block: Array) -> Products:
    """Return the arithmetic of an array's library."""
    return NumpyProducts() if isinstance(block, np.ndarray) else TorchProducts()


def spaced(matrix: Array) -> Array:
    """Return a copy whose rows BLAS likes to read, if it is numpy's and has many columns."""
    if not isinstance(matrix, np.ndarray) or matrix.shape[1] < 256:
        return matrix
    rows, width = matrix.shape
    copy = np.empty((rows, width + SPACING), dtype=matrix.dtype)[:, :width]
    copy[...] = matrix
    return copy
