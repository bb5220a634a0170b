"""What each kind of delta does to a weight, block of rows by block of rows.

A weight of any shape is seen as a matrix ``(rows, columns)`` in the order in which it is
stored: ``(out, in)`` for a linear layer, ``(out, in · kernel)`` for a convolution, ``(in, out)``
for GPT-2's Conv1D, ``(vocabulary, dim)`` for an embedding, ``(experts · rows, columns)`` for
fused experts. A delta changes any block of whole rows of it, given the original values of the
same rows, so that no weight ever has to be in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loratool.math.lowrank import LowRank

__all__ = [
    "Additive",
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

    def apply(self, block: Tensor, original: Tensor, start: int) -> None:
        """Change ``block`` in place.

        Args:
            block: Rows ``start`` onwards as changed so far, ``(rows, columns)``, float32 or
                float64.
            original: The same rows before any change.
            start: Index of the first row.
        """
        ...


@dataclass(frozen=True, slots=True)
class Additive:
    """LoRA: ``W += scale · up @ down`` on the whole matrix."""

    delta: LowRank

    def apply(self, block: Tensor, original: Tensor, start: int) -> None:
        self.delta.add_to(block, start)


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

    def apply(self, block: Tensor, original: Tensor, start: int) -> None:
        rows, columns = self.delta.shape
        begin = max(start, self.first_row)
        end = min(start + block.shape[0], self.first_row + rows)
        if begin < end:
            region = block[
                begin - start : end - start, self.first_column : self.first_column + columns
            ]
            self.delta.add_to(region, begin - self.first_row)


@dataclass(frozen=True, slots=True)
class WeightDecomposed:
    """DoRA (arXiv 2402.09353): ``W ← f · (W + Δ)`` with ``f = magnitude / ‖W₀ + Δ‖``.

    ``W₀`` is the original weight, so that several such adapters apply in turn, each with the
    factor that it was trained with. With a ``weight`` other than one, ``W`` moves that share of
    the way.

    Attributes:
        delta: Of the whole matrix.
        magnitude: ``(rows,)`` where norms run over columns; else ``(columns,)``.
        norms: ``(columns,)`` norms of ``W₀ + Δ`` where they run over rows, else ``None``.
        weight: How much of the change to make.
        reference: Returns ``W₀`` from the first row and the original rows, where the adapter
            was trained on another weight than the original (see :meth:`Interpolated.target`).
    """

    delta: LowRank
    magnitude: Tensor
    norms: Tensor | None = None
    weight: float = 1.0
    reference: Callable[[int, Tensor], Tensor] | None = None

    def apply(self, block: Tensor, original: Tensor, start: int) -> None:
        moved = block.clone()
        self.delta.add_to(moved, start)
        if self.norms is None:
            reference = original.clone()
            if self.reference is not None:
                reference = self.reference(start, original).clone()
            self.delta.add_to(reference, start)
            norms = torch.linalg.vector_norm(reference, dim=1, dtype=torch.float64)
            magnitude = self.magnitude[start : start + block.shape[0]]
            factor = (magnitude.double() / norms).to(block.dtype).unsqueeze(1)
        else:
            factor = (self.magnitude.double() / self.norms).to(block.dtype)
        moved.mul_(factor)
        _move(block, moved, self.weight)


def column_norms(blocks: Iterator[tuple[int, Tensor]], delta: LowRank, columns: int) -> Tensor:
    """Return ``‖W + Δ‖`` of each column, ``(columns,)`` float64, from blocks of rows of W.

    Args:
        blocks: Pairs of first row and rows, ``(rows, columns)``; they may be overwritten.
        delta: Of the whole matrix.
        columns: Its number of columns.
    """
    squares = torch.zeros(columns, dtype=torch.float64, device=delta.up.device)
    for start, block in blocks:
        delta.add_to(block, start)
        squares += block.square().sum(dim=0, dtype=torch.float64)
    return squares.sqrt_()


@dataclass(frozen=True, slots=True)
class Offset:
    """``W += scale · values``: an additive bias, or any full difference.

    Attributes:
        values: ``(rows, columns)``.
        scale: A number.
    """

    values: Tensor
    scale: float

    def apply(self, block: Tensor, original: Tensor, start: int) -> None:
        rows = self.values[start : start + block.shape[0]].to(block.dtype)
        block.add_(rows.mul(self.scale))


@dataclass(frozen=True, slots=True)
class Interpolated:
    """``W += weight · (values - W₀)``: another weight in place of the original, or part of it.

    Attributes:
        values: Returns rows ``start`` to ``start + count``, ``(count, columns)``.
        weight: 1 replaces the weight, exactly where nothing else has changed it before.
        only_if_different: The values are a copy of the original in a dtype of their own; keep
            the original wherever it rounds to them.
        base: Returns rows of ``W₀``, where something else has taken the place of the original.
    """

    values: Callable[[int, int], Tensor]
    weight: float
    only_if_different: bool = False
    base: Callable[[int, int], Tensor] | None = None

    def target(self, start: int, original: Tensor) -> Tensor:
        """Return the rows that a weight of 1 leads to, ``(rows, columns)``."""
        stored = self.values(start, original.shape[0]).to(original.device)
        rows = stored.to(original.dtype)
        if self.only_if_different:
            rows = torch.where(original.to(stored.dtype) == stored, original, rows)
        return rows

    def apply(self, block: Tensor, original: Tensor, start: int) -> None:
        base = original
        if self.base is not None:
            base = self.base(start, block.shape[0]).to(block)
        rows = self.target(start, base)
        if self.weight == 1 and torch.equal(block, base):
            block.copy_(rows)
        else:
            block.add_(rows.sub(base).mul_(self.weight))


@dataclass(frozen=True, slots=True)
class Rows:
    """New values for some rows, ``W[i] += weight · (values - W₀[i])``: trained tokens.

    Attributes:
        indices: ``(k,)`` row numbers, in any order.
        values: ``(k, columns)``.
        weight: 1 replaces the rows, exactly where nothing else has changed them before.
    """

    indices: tuple[int, ...]
    values: Tensor
    weight: float = 1.0

    def apply(self, block: Tensor, original: Tensor, start: int) -> None:
        for position, row in enumerate(self.indices):
            if start <= row < start + block.shape[0]:
                target, before = block[row - start], original[row - start]
                value = self.values[position].to(block.dtype)
                if self.weight == 1 and torch.equal(target, before):
                    target.copy_(value)
                else:
                    target.add_(value.sub(before).mul_(self.weight))


def _move(block: Tensor, target: Tensor, weight: float) -> None:
    """Move ``block`` by ``weight`` of the way to ``target``, in place."""
    if weight == 1:
        block.copy_(target)
    else:
        block.add_(target.sub(block).mul_(weight))
