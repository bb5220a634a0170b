"""Where in the matrix of a stored weight something lies, and which way round."""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    @property
    def width(self) -> int:
        """Columns of the matrix that the region is a part of."""
        return self.columns if self.full_width is None else self.full_width

    def outputs(self, first: int, count: int) -> Region:
        """Return the region of ``count`` of its outputs, from ``first`` on."""
        if self.transposed:
            return replace(
                self,
                columns=count,
                first_column=self.first_column + first,
                full_width=self.width,
            )
        return replace(self, rows=count, first_row=self.first_row + first)
