"""A matrix of which only some rows are in memory at a time, and products with such."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from loratool.math.namespace import Array, array_namespace

__all__ = ["NeedsAllRowsError", "RowTiles", "project", "times"]


class NeedsAllRowsError(RuntimeError):
    """Something cannot be done with a few rows at a time."""


@dataclass(frozen=True, eq=False)
class RowTiles:
    """A matrix ``(m, n)``, or the transpose of one, whose rows are made whenever they are wanted.

    Attributes:
        rows: How many there are.
        step: How many are made at a time.
        make: Returns rows, given the first and how many.
        like: An array ``(0, n)`` of the library, the dtype and the device of the rows.
        is_turned: Whether it is the transpose that is meant.
    """

    rows: int
    step: int
    make: Callable[[int, int], Array]
    like: Array
    is_turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """That of the matrix that is meant."""
        width: int = self.like.shape[1]
        return (width, self.rows) if self.is_turned else (self.rows, width)

    @property
    def dtype(self) -> Any:
        """Of the elements."""
        return self.like.dtype

    @property
    def device(self) -> Any:
        """Where rows appear."""
        return self.like.device

    @property
    def mT(self) -> RowTiles:  # noqa: N802 - the name in the standard
        """The transpose."""
        return replace(self, is_turned=not self.is_turned)

    def __array_namespace__(self, **_: Any) -> Any:
        """Return that of the rows."""
        return array_namespace(self.like)

    def tiles(self) -> Iterator[tuple[int, Array]]:
        """Yield the rows, a few at a time, each with the index of the first."""
        for start in range(0, self.rows, self.step):
            yield start, self.make(start, min(self.step, self.rows - start))


def times(matrix: Array, right: Array) -> Array:
    """Return ``matrix @ right``."""
    if not isinstance(matrix, RowTiles):
        return matrix @ right
    tiles = [tile @ right for _, tile in matrix.tiles()]
    return array_namespace(right).concat(tiles, axis=0)


def project(left: Array, matrix: Array) -> Array:
    """Return ``leftᵀ @ matrix``."""
    if not isinstance(matrix, RowTiles):
        return left.mT @ matrix
    total: Array = None
    for start, tile in matrix.tiles():
        part = left[start : start + tile.shape[0], :].mT @ tile
        total = part if total is None else total + part
    return total
