"""What a tensor in a file is, and where its bytes lie. Neither costs I/O on tensor data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from loratool.files.dtypes import DTYPES

__all__ = ["StoredTensor", "TensorSource", "TensorSpec"]


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
        exchanged: ``(n, a, b)`` where its rows, seen as ``(n, a, b, …)``, lie with the axes a and b
            exchanged; it has strides then, those of its file.
    """

    spec: TensorSpec
    path: Path
    offset: int
    strides: tuple[int, ...] | None = None
    alias_of: str | None = None
    exchanged: tuple[int, int, int] | None = None

    @property
    def span(self) -> int:
        """Number of bytes from the first element to the last one, both included."""
        if self.strides is None:
            return self.spec.nbytes
        if self.spec.elements == 0:
            return 0
        last = sum(
            (size - 1) * stride for size, stride in zip(self.spec.shape, self.strides, strict=True)
        )
        return DTYPES[self.spec.dtype].size(last + 1)

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
        if self.exchanged is not None:
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
        count, outer, inner = axes
        if self.exchanged == axes:
            return replace(self, exchanged=None, strides=None)
        shape = self.spec.shape
        if self.strides is not None or len(shape) not in (1, 2) or shape[0] % math.prod(axes):
            return None
        return replace(self, strides=(*shape[1:], 1), exchanged=(count, inner, outer))


class TensorSource(Protocol):
    """Anything that holds named tensors: one file, or a checkpoint of several shards."""

    @property
    def path(self) -> Path:
        """The file or folder."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors by name, in the order of the file."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """Free text that the file carries along."""
        ...
