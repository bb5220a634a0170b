"""What a tensor in a file is, and where its bytes lie. Neither costs I/O on tensor data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from loratool.files.dtypes import DTYPES

__all__ = ["StoredTensor", "TensorSpec", "Whole"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype (as in a safetensors header) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar, 0 where a dimension is 0."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return DTYPES[self.dtype].size(self.elements)


class Whole(Protocol):
    """A tensor whose parts lie apart."""

    def read(self) -> bytes:
        """Return all of it, row-major."""
        ...


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the place of its data.

    Attributes:
        spec: What it is.
        path: The file that holds it.
        offset: Byte offset of the first element in that file.
        strides: Element strides where the data is not contiguous in row-major order (only
            pickled checkpoints can hold such), else ``None``.
        alias_of: Name of another tensor that owns the same bytes, or ``None``.
        steps: Where its rows do not follow each other: how many there are, and how many rows
            further each lies, the outermost such loop first. It has strides then, those of a row.
        whole: What its data are read from where they are no run of a file; the offset is the one
            inside that.
    """

    spec: TensorSpec
    path: Path
    offset: int
    strides: tuple[int, ...] | None = None
    alias_of: str | None = None
    steps: tuple[tuple[int, int], ...] | None = None
    whole: Whole | None = None

    @property
    def is_run(self) -> bool:
        """Whether its data are one run of bytes of its file, in their order."""
        return self.strides is None and self.whole is None

    @property
    def extents(self) -> tuple[tuple[Path, int, int], ...]:
        """File, offset and size of its data, where they are one run of bytes; else nothing."""
        return ((self.path, self.offset, self.spec.nbytes),) if self.is_run else ()

    @property
    def span(self) -> int:
        """Number of bytes from the first element to the last one, both included."""
        if self.strides is None:
            return self.spec.nbytes
        if self.spec.elements == 0:
            return 0
        sizes, strides = self.layout
        last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        return DTYPES[self.spec.dtype].size((last + 1) * self._unit)

    @property
    def _unit(self) -> int:
        """How many elements are always together."""
        block = DTYPES[self.spec.dtype].block
        return block[0] if block is not None else 1

    @property
    def layout(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes and strides that yield its elements in their order, where it has strides.

        Of blocks, which only lie in whole rows, those of the blocks.
        """
        shape, strides = self.spec.shape, self.strides or ()
        if self.steps is None:
            return shape, strides
        unit = self._unit
        row = math.prod(shape[1:]) // unit
        counts = tuple(size for size, _ in self.steps)
        steps = tuple(step * row for _, step in self.steps)
        if unit > 1:
            return (*counts, row), (*steps, 1)
        return (*counts, *shape[1:]), (*steps, *strides[1:])

    def rows(self, first: int, count: int, width: int) -> StoredTensor | None:
        """Return some of its rows, which lie where they are.

        Args:
            first: The first of them.
            count: How many.
            width: Columns of the matrix that it is seen as; 1 for a vector, which stays one.

        Returns:
            ``(count, width)``, or ``(count,)``; ``None`` where it does not lie in such rows.
        """
        shape, strides = self.spec.shape, self.strides
        if self.steps is not None:
            return None
        if strides is not None and (len(shape) > 2 or width != (*shape, 1)[1]):
            return None
        row = width if strides is None else strides[0]
        return replace(
            self,
            spec=replace(self.spec, shape=(count, width) if len(shape) > 1 else (count,)),
            offset=self.offset + DTYPES[self.spec.dtype].size(first * row),
        )

    def exchanging(self, axes: tuple[int, int, int]) -> StoredTensor | None:
        """Return it with its rows, seen as ``(*axes, …)``, with the last two axes exchanged.

        Returns:
            ``None`` where it lies in no such rows.
        """
        loops = self._loops(axes)
        if loops is None:
            return None
        count, outer, inner, rest = loops
        return self._stepping([*count, *inner, *outer, *rest], 0)

    def keeping(self, count: int, first: int, last: int) -> StoredTensor | None:
        """Return the rows ``first`` to ``last`` of each of as many equal parts as ``count``.

        Returns:
            ``None`` where it lies in no such rows.
        """
        height = self.spec.shape[0] // max(1, count) if self.spec.shape else 0
        loops = self._loops((count, height))
        if loops is None or any(len(loop) > 1 for loop in loops[1:]) or not 0 <= first <= last:
            return None
        parts, (each,), _ = loops
        step = each[1]
        return self._stepping([*parts, (min(last, height) - first, step)], first * step)

    def _loops(self, axes: Sequence[int]) -> list[list[tuple[int, int]]] | None:
        """Return the loops over its rows, seen as ``(*axes, …)``, for each axis and the rest."""
        shape = self.spec.shape
        is_flat = self.strides is None or self.steps is not None
        is_cut = self._unit > 1 and (len(shape) != 2 or shape[1] % self._unit)
        if not is_flat or is_cut or len(shape) not in (1, 2) or not shape[0]:
            return None
        if min(axes) < 1 or shape[0] % math.prod(axes):
            return None
        left = list(self.steps or ((shape[0], 1),))
        found: list[list[tuple[int, int]]] = []
        for size in axes:
            mine: list[tuple[int, int]] = []
            while size > 1:
                count, step = left.pop(0)
                if size % count == 0:
                    mine.append((count, step))
                    size //= count
                elif count % size == 0:
                    mine.append((size, step * (count // size)))
                    left.insert(0, (count // size, step))
                    size = 1
                else:
                    return None
            found.append(mine or [(1, 1)])
        return [*found, left or [(1, 1)]]

    def _stepping(self, loops: Sequence[tuple[int, int]], first: int) -> StoredTensor:
        """Return it with its rows in the order of loops, from some row on."""
        shape = self.spec.shape
        steps: list[tuple[int, int]] = []
        for size, step in loops:
            if size == 1:
                continue
            if steps and steps[-1][1] == size * step:
                steps[-1] = (steps[-1][0] * size, step)
            else:
                steps.append((size, step))
        rows = math.prod(size for size, _ in steps)
        is_flat = not steps or (len(steps) == 1 and steps[0][1] == 1)
        offset = DTYPES[self.spec.dtype].size(first * math.prod(shape[1:]))
        return replace(
            self,
            spec=replace(self.spec, shape=(rows, *shape[1:])),
            offset=self.offset + offset,
            strides=None if is_flat else (*shape[1:], 1),
            steps=None if is_flat else tuple(steps),
        )
