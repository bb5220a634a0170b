"""Numbers at a few places of a matrix, as much of them as is asked for."""

from __future__ import annotations

import numpy as np

from loratool.math.namespace import Array, beside, on_host

__all__ = ["Places"]


class Places:
    """Numbers and where they are, in the order of their rows; several at one place add up.

    Args:
        rows: The row of each, ``(n,)``.
        columns: Its column, ``(n,)``.
        values: The numbers, ``(n,)``.
    """

    def __init__(self, rows: Array, columns: Array, values: Array) -> None:
        found = on_host(rows).astype(np.int64)
        order = np.argsort(found, kind="stable")
        self.rows = found[order]
        self.columns = on_host(columns).astype(np.int64)[order]
        self.values = on_host(values).astype(np.float64)[order]

    def outside(self, height: int, width: int) -> tuple[int, int] | None:
        """Return a place outside of a matrix of so many rows and columns, if there is one."""
        is_outside = (self.rows < 0) | (self.rows >= height)
        is_outside |= (self.columns < 0) | (self.columns >= width)
        found = np.flatnonzero(is_outside)
        return (int(self.rows[found[0]]), int(self.columns[found[0]])) if found.size else None

    def part(self, row: int, column: int, like: Array) -> Array:
        """Return rows and columns of the matrix, of the shape and library of a matrix.

        Args:
            row: The first row.
            column: The first column.
            like: ``(rows, columns)``.
        """
        height, width = like.shape
        first, last = np.searchsorted(self.rows, (row, row + height))
        columns = self.columns[first:last] - column
        inside = (columns >= 0) & (columns < width)
        whole = np.zeros((height, width))
        rows = self.rows[first:last][inside] - row
        np.add.at(whole, (rows, columns[inside]), self.values[first:last][inside])
        return beside(whole, like)
