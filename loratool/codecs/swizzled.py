"""Scales of blocks in the order of cuBLAS, as ComfyUI stores them: tiles of 128 rows by 4 columns.

In a tile the 32 rows that are 32 apart from one another are neighbours: the scale of row ``r`` and
column ``c`` lies at byte ``(r % 32) · 16 + (r // 32) · 4 + c``. Tiles follow row by row. What is
beyond the weight is zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TILE_ROWS", "padded", "swizzled", "unswizzled"]

TILE_ROWS: Final = 128
TILE_COLUMNS: Final = 4


def padded(rows: int, columns: int) -> tuple[int, int]:
    """Return how many rows and columns of scales are stored for so many."""
    whole = -(-rows // TILE_ROWS) * TILE_ROWS
    return whole, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def unswizzled(stored: NDArray[Any]) -> NDArray[Any]:
    """Return whole tiles, rows of the stored scales, as one scale after the other."""
    rows, columns = stored.shape
    tiles = stored.reshape(rows // TILE_ROWS, columns // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4)).reshape(rows, columns)


def swizzled(scales: NDArray[Any]) -> NDArray[Any]:
    """Return scales as they are stored: those of all rows of some tiles, padded with zeros."""
    rows, columns = padded(*scales.shape)
    whole = np.zeros((rows, columns), scales.dtype)
    whole[: scales.shape[0], : scales.shape[1]] = scales
    tiles = whole.reshape(rows // TILE_ROWS, 4, 32, columns // TILE_COLUMNS, TILE_COLUMNS)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4)).reshape(rows, columns)
