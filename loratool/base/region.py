"""Where in the matrix of a stored weight something lies, and which way round."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratool.math.namespace import Array

__all__ = ["Region"]


@dataclass(frozen=True, slots=True)
class Region:
    """Where in the matrix of a weight a delta goes, and how it lies there.

    Attributes:
        rows: Rows of the matrix that one delta covers.
        columns: Columns that it covers.
        first_row: Its first row.
        first_column: Its first column.
        transposed: Whether the weight is stored as ``(in, out)``, the delta as ``(out, in)``.
        experts: How many deltas the factors stack; one after the other along the rows.
        expert: Which one of the stacked deltas is meant, or ``None`` for all in turn.
        part: ``(index, parts)``: which slice of the delta's outputs goes here, where the base
            has split what the adapter treats as one.
        full_width: Columns of the whole matrix, where the region has fewer.
        exchanged: ``(n, a, b)`` where the outputs, seen as ``(n, a, b)``, lie with the last two
            axes exchanged: halves that are interleaved, or pairs that are apart.
        has_plain_bias: Whether the bias beside it has its outputs in their order all the same.
    """

    rows: int
    columns: int
    first_row: int = 0
    first_column: int = 0
    transposed: bool = False
    experts: int = 1
    expert: int | None = None
    part: tuple[int, int] = (0, 1)
    full_width: int | None = None
    exchanged: tuple[int, int, int] | None = None
    has_plain_bias: bool = False

    @property
    def bias_exchanged(self) -> tuple[int, int, int] | None:
        """The same of the bias beside it."""
        return None if self.has_plain_bias else self.exchanged

    @property
    def width(self) -> int:
        """Columns of the matrix that the region is a part of."""
        return self.columns if self.full_width is None else self.full_width

    def stored(self, values: Array) -> Array:
        """Return what has a row for each output with these rows as they lie."""
        return values if self.exchanged is None else _exchange(values, *self.exchanged)

    def ordered(self, values: Array) -> Array:
        """Return what has rows as they lie with a row for each output, in their order."""
        if self.exchanged is None:
            return values
        count, outer, inner = self.exchanged
        return _exchange(values, count, inner, outer)

    def outputs(self, first: int, count: int) -> Region:
        """Return the region of ``count`` of its outputs, from ``first`` on."""
        assert self.exchanged is None
        if self.transposed:
            return replace(
                self,
                columns=count,
                first_column=self.first_column + first,
                full_width=self.width,
            )
        return replace(self, rows=count, first_row=self.first_row + first)


def _exchange(values: Array, count: int, outer: int, inner: int) -> Array:
    """Return rows that are seen as ``(count, outer, inner)`` with the last two exchanged."""
    from loratool.math.namespace import array_namespace  # finding a module takes no numpy

    xp = array_namespace(values)
    seen = xp.reshape(values, (count, outer, inner, *values.shape[1:]))
    axes = (0, 2, 1, *range(3, seen.ndim))
    return xp.reshape(xp.permute_dims(seen, axes), values.shape)
