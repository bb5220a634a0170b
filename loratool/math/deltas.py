"""What each kind of delta does to a weight, block of rows by block of rows.

A weight of any shape is seen as a matrix ``(rows, columns)`` in the order in which it is
stored: ``(out, in)`` for a linear layer, ``(out, in · kernel)`` for a convolution, ``(in, out)``
for GPT-2's Conv1D, ``(vocabulary, dim)`` for an embedding, ``(experts · rows, columns)`` for
fused experts. A delta changes any block of whole rows of it, given the original values of the
same rows, so that no weight ever has to be in memory as a whole.

Arrays are numpy's or PyTorch's, all of a delta's and of its blocks' of one library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from loratool.math.lowrank import LowRank
from loratool.math.namespace import Array, array_namespace, double
from loratool.math.products import Products, products_of

__all__ = [
    "Additive",
    "Changed",
    "Delta",
    "Interpolated",
    "Offset",
    "Placed",
    "Rows",
    "WeightDecomposed",
    "column_norms",
]


class Delta(Protocol):
    """A change of one weight."""

    def apply(
        self, block: Array, original: Array, start: int, products: Products | None = None
    ) -> None:
        """Change ``block`` in place.

        Args:
            block: Rows ``start`` onwards as changed so far, ``(rows, columns)``, float32 or
                float64.
            original: The same rows before any change.
            start: Index of the first row.
            products: The arithmetic, with the memory of the thread that calls.
        """
        ...


@dataclass(frozen=True, slots=True)
class Additive:
    """LoRA: ``W += scale · up @ down`` on the whole matrix."""

    delta: LowRank

    def apply(
        self, block: Array, original: Array, start: int, products: Products | None = None
    ) -> None:
        _add(self.delta, block, start, products)


@dataclass(frozen=True, slots=True)
class Placed:
    """LoRA on some rows and columns of the matrix: one expert, or half of a fused projection.

    Attributes:
        delta: Of the shape of the region.
        first_row: Where the region begins.
        first_column: Where the region begins.
    """

    delta: LowRank
    first_row: int
    first_column: int

    def apply(
        self, block: Array, original: Array, start: int, products: Products | None = None
    ) -> None:
        rows, columns = self.delta.shape
        begin = max(start, self.first_row)
        end = min(start + block.shape[0], self.first_row + rows)
        if begin < end:
            region = block[
                begin - start : end - start, self.first_column : self.first_column + columns
            ]
            _add(self.delta, region, begin - self.first_row, products)


@dataclass(frozen=True, slots=True)
class WeightDecomposed:
    """DoRA (arXiv 2402.09353): ``W ← f · (W + Δ)`` with ``f = magnitude / ‖W₀ + Δ‖``.

    ``W₀`` is the original weight, so that several such adapters apply in turn, each with the
    factor that it was trained with. With a ``weight`` other than one, ``W`` moves that share of
    the way.

    Attributes:
        delta: What is added first, to the region alone.
        magnitude: ``(rows,)`` of the region where norms run over columns; else ``(columns,)``.
        norms: ``(columns,)`` norms of ``W₀ + Δ`` where they run over rows, else ``None``.
        weight: How much of the change to make.
        reference: Returns ``W₀`` from the first row and the original rows, where the adapter
            was trained on another weight than the original (see :meth:`Interpolated.target`).
        rows: Rows and columns of the region, from the first of each on; 0 stands for all.
        columns: See ``rows``.
        first_row: See ``rows``.
        first_column: See ``rows``.
    """

    delta: Delta
    magnitude: Array
    norms: Array | None = None
    weight: float = 1.0
    reference: Callable[[int, Array], Array] | None = None
    rows: int = 0
    columns: int = 0
    first_row: int = 0
    first_column: int = 0

    def apply(
        self, block: Array, original: Array, start: int, products: Products | None = None
    ) -> None:
        products = products or products_of(block)
        count, width = block.shape
        begin = max(start, self.first_row)
        end = min(start + count, self.first_row + self.rows) if self.rows else start + count
        if begin >= end:
            return
        last = self.first_column + self.columns if self.columns else width
        part = slice(begin - start, end - start), slice(self.first_column, last)
        xp = array_namespace(block)
        moved = xp.asarray(block, copy=True)
        self.delta.apply(moved, original, start, products)
        if self.norms is None:
            reference = original if self.reference is None else self.reference(start, original)
            reference = xp.asarray(reference, copy=True)
            self.delta.apply(reference, original, start, products)
            magnitude = double(self.magnitude[begin - self.first_row : end - self.first_row])
            factor = _quotient(magnitude, products.row_norms(reference[part]))[:, None]
        else:
            factor = _quotient(double(self.magnitude), self.norms)
        moved = moved[part]
        moved *= xp.astype(factor, block.dtype)
        if self.weight == 1:
            block[part] = moved
        else:
            moved -= block[part]
            moved *= self.weight
            block[part] += moved


def column_norms(
    blocks: Iterator[tuple[int, Array]],
    delta: Delta,
    columns: int,
    products: Products | None = None,
    region: tuple[int, int, int] | None = None,
) -> Array:
    """Return ``‖W + Δ‖`` of each column, ``(columns,)`` float64, from blocks of rows of W.

    Sums run from block to block, so that they are the same whoever computes them.

    Args:
        blocks: Pairs of first row and rows, ``(rows, width)``; they may be overwritten.
        delta: What is added first.
        columns: How many columns.
        products: The arithmetic, with the memory of the thread that calls.
        region: First row, number of rows and first column of what norms are taken of, where that
            is not the whole matrix.
    """
    total: Array = None
    for start, block in blocks:
        products = products or products_of(block)
        first, rows, left = region or (start, block.shape[0], 0)
        begin, end = max(start, first), min(start + block.shape[0], first + rows)
        if begin >= end:
            continue
        delta.apply(block, block, start, products)
        part = block[begin - start : end - start, left : left + columns]
        squares = products.column_squares(part)
        total = squares if total is None else total + squares
    return array_namespace(total).sqrt(total)


@dataclass(frozen=True, slots=True)
class Offset:
    """``W += scale · values`` on some rows and columns: a bias, or any full difference.

    Attributes:
        values: Returns rows ``start`` to ``start + count``, ``(count, columns)``, of the dtype of
            the blocks.
        scale: A number.
        rows: Rows of the values.
        columns: Columns of the values.
        first_row: Where they begin.
        first_column: Where they begin.
    """

    values: Callable[[int, int], Array]
    scale: float
    rows: int
    columns: int
    first_row: int = 0
    first_column: int = 0

    def apply(
        self, block: Array, original: Array, start: int, products: Products | None = None
    ) -> None:
        begin = max(start, self.first_row)
        end = min(start + block.shape[0], self.first_row + self.rows)
        if begin < end:
            columns = slice(self.first_column, self.first_column + self.columns)
            added = self.values(begin - self.first_row, end - begin) * self.scale
            block[begin - start : end - start, columns] += added


@dataclass(frozen=True, slots=True)
class Interpolated:
    """``W += weight · (values - W₀)``: another weight in place of the original, or part of it.

    Attributes:
        values: Returns rows ``start`` to ``start + count``, ``(count, columns)``, in the dtype
            of the blocks.
        weight: 1 replaces the weight, exactly where nothing else has changed it before.
        rounded: Given where the values are a copy of the original in a dtype of their own:
            rounds an array to that dtype. The original is kept wherever it rounds to the copy.
        base: Returns rows of ``W₀``, where something else has taken the place of the original.
    """

    values: Callable[[int, int], Array]
    weight: float
    rounded: Callable[[Array], Array] | None = None
    base: Callable[[int, int], Array] | None = None

    def target(self, start: int, original: Array) -> Array:
        """Return the rows that a weight of 1 leads to, ``(rows, columns)``."""
        rows = self.values(start, original.shape[0])
        if self.rounded is not None:
            rows = array_namespace(rows).where(self.rounded(original) == rows, original, rows)
        return rows

    def apply(
        self, block: Array, original: Array, start: int, products: Products | None = None
    ) -> None:
        base = original if self.base is None else self.base(start, block.shape[0])
        rows = self.target(start, base)
        _move(block, base, rows, self.weight)


@dataclass(frozen=True, slots=True)
class Changed:
    """A region becomes a function of itself, ``W += weight · (f(W) - W)``, in float64.

    Unlike others it looks at the weight as those before it have left it: several such changes are
    made in turn, as PEFT does.

    Attributes:
        function: f: given a part of the region as a delta sees it, ``(out, in, *kernel)``, and its
            first row and column, what it becomes.
        rows: Rows of the region.
        columns: Its columns.
        first_row: Where it begins.
        first_column: Where it begins.
        kernel: The kernel of a convolution.
        is_transposed: Whether it is stored as ``(in, out)``.
        weight: How much of the change to make.
        first: Which output of the function's weight is the first of the region.
        difference: Given where the change is one of the original, whatever has become of it since:
            returns that of a part, as ``function`` returns the whole.
    """

    function: Callable[[Array, int, int], Array]
    rows: int
    columns: int
    first_row: int = 0
    first_column: int = 0
    kernel: tuple[int, ...] = ()
    is_transposed: bool = False
    weight: float = 1.0
    first: int = 0
    difference: Callable[[Array, int, int], Array] | None = None

    def apply(
        self, block: Array, original: Array, start: int, products: Products | None = None
    ) -> None:
        begin = max(start, self.first_row)
        end = min(start + block.shape[0], self.first_row + self.rows)
        if begin >= end:
            return
        columns = slice(self.first_column, self.first_column + self.columns)
        region = double(block[begin - start : end - start, columns])
        row = begin - self.first_row
        if self.difference is not None:
            seen = double(original[begin - start : end - start, columns])
            moved = region + self._made(self.difference, seen, row) * self.weight
        else:
            moved = self._made(self.function, region, row)
            if self.weight != 1:
                moved = region + (moved - region) * self.weight
        block[begin - start : end - start, columns] = array_namespace(block).astype(
            moved, block.dtype
        )

    def _made(self, function: Callable[[Array, int, int], Array], region: Array, row: int) -> Array:
        """Return what a function makes of rows of the region, as they are stored."""
        if self.is_transposed:
            return function(region.T, self.first, row).T
        part = region.reshape((region.shape[0], -1, *self.kernel))
        return function(part, self.first + row, 0).reshape(region.shape)


@dataclass(frozen=True, slots=True)
class Rows:
    """New values for some rows, ``W[i] += weight · (values - W₀[i])``: trained tokens.

    Attributes:
        indices: ``(k,)`` row numbers, in any order.
        values: ``(k, columns)``, of the dtype of the blocks.
        weight: 1 replaces the rows, exactly where nothing else has changed them before.
    """

    indices: tuple[int, ...]
    values: Array
    weight: float = 1.0

    def apply(
        self, block: Array, original: Array, start: int, products: Products | None = None
    ) -> None:
        for position, row in enumerate(self.indices):
            if start <= row < start + block.shape[0]:
                before = original[row - start]
                _move(block[row - start], before, self.values[position], self.weight)


def _quotient(magnitude: Array, norms: Array) -> Array:
    """Return ``magnitude / norms``; what has no norm is zero, and stays so."""
    return magnitude / array_namespace(norms).where(norms > 0, norms, 1.0)


def _add(delta: LowRank, block: Array, start: int, products: Products | None) -> None:
    """Add rows ``start`` onwards of a delta to as many rows of a block, in place."""
    up = delta.up[start : start + block.shape[0]]
    (products or products_of(block)).add_product(block, up, delta.down, delta.scale)


def _move(block: Array, before: Array, target: Array, weight: float) -> None:
    """Add ``weight · (target - before)`` to ``block``, in place; all of it exactly if it can."""
    if weight == 1 and bool((block == before).all()):
        block[...] = target
    else:
        block += (target - before) * weight
