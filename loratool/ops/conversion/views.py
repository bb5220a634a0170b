"""Values seen in another way: parts of them, turned, reshaped, put together.

What is stored stays stored: its bytes are read through another offset and other strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratool.adapter.scheme import transposed
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor
from loratool.ops.conversion.values import (
    Arranged,
    Computed,
    Constant,
    Reshaped,
    Scaled,
    Stored,
    Value,
    widest,
)

__all__ = [
    "block_diagonal",
    "columns",
    "concatenated",
    "flipped",
    "reshaped",
    "rows",
    "scaled",
]


def scaled(value: Value, factor: float) -> Value:
    """Return ``value`` times ``factor``."""
    return value if factor == 1 else Scaled(value, factor)


def rows(value: Value, start: int, stop: int) -> Value:
    """Return rows ``start`` to ``stop``; a view where the value is stored."""
    shape = (stop - start, *value.shape[1:])
    if shape == value.shape:
        return value
    match value:
        case Stored(tensor):
            return Stored(_cut(tensor, start, 0, shape))
        case Scaled(inner, factor):
            return Scaled(rows(inner, start, stop), factor)
        case Arranged(pieces):
            return _cut_rows(pieces, start, stop, shape, value.dtype)
        case Computed():
            return replace(
                value,
                function=lambda *tensors: value.function(*tensors).reshape(value.shape)[start:stop],
                shape=shape,
            )
    return replace(value, shape=shape)  # type: ignore[type-var]


def _cut_rows(
    pieces: Sequence[tuple[Value, int, int]],
    start: int,
    stop: int,
    shape: tuple[int, ...],
    dtype: str,
) -> Value:
    kept = []
    for piece, row, column in pieces:
        first, last = max(start, row), min(stop, row + piece.shape[0])
        if first < last:
            kept.append((rows(piece, first - row, last - row), first - start, column))
    if len(kept) == 1 and kept[0][0].shape == shape:
        return kept[0][0]
    return Arranged(tuple(kept), shape, dtype)


def columns(value: Value, start: int, stop: int) -> Value:
    """Return columns ``start`` to ``stop`` of a stored or scaled value."""
    shape = (value.shape[0], stop - start, *value.shape[2:])
    match value:
        case Stored(tensor):
            return Stored(_cut(tensor, 0, start, shape))
        case Scaled(inner, factor):
            return Scaled(columns(inner, start, stop), factor)
    raise AssertionError("only stored factors are cut by columns")


def _cut(tensor: StoredTensor, row: int, column: int, shape: tuple[int, ...]) -> StoredTensor:
    strides = tensor.strides or contiguous_strides(tensor.spec.shape)
    begin = row * strides[0] + (column * strides[1] if column else 0)
    width = DTYPES[tensor.spec.dtype].bits // 8
    is_flat = strides == contiguous_strides(shape)
    return StoredTensor(
        replace(tensor.spec, shape=shape),
        tensor.path,
        tensor.offset + begin * width,
        None if is_flat else strides,
        tensor.alias_of,
    )


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the element strides of a tensor in row-major order."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def flipped(value: Value) -> Value:
    """Return a matrix with rows and columns exchanged; a view where it is stored."""
    match value:
        case Stored(tensor):
            return Stored(_plain(transposed(tensor)))
        case Scaled(inner, factor):
            return Scaled(flipped(inner), factor)
        case Constant(number, shape, dtype):
            return Constant(number, (shape[1], shape[0]), dtype)
        case Arranged(pieces, shape, dtype):
            turned = tuple((flipped(piece), column, row) for piece, row, column in pieces)
            return Arranged(turned, (shape[1], shape[0]), dtype)
        case Computed():
            return replace(
                value,
                function=lambda *tensors: value.function(*tensors).reshape(value.shape).T,
                shape=(value.shape[1], value.shape[0]),
            )
    raise AssertionError(value)


def _plain(tensor: StoredTensor) -> StoredTensor:
    """Return the same view without strides where they are those of row-major order."""
    if tensor.strides is None or tensor.strides != contiguous_strides(tensor.spec.shape):
        return tensor
    return replace(tensor, strides=None)


def reshaped(value: Value, shape: tuple[int, ...]) -> Value:
    """Return the same numbers in another shape."""
    if value.shape == shape:
        return value
    match value:
        case Stored(tensor) if tensor.strides is None:
            return Stored(replace(tensor, spec=replace(tensor.spec, shape=shape)))
        case Stored(tensor):
            return Computed("reshaped", (tensor,), lambda one: one, shape, tensor.spec.dtype)
        case Scaled(inner, factor):
            return Scaled(reshaped(inner, shape), factor)
        case Arranged():
            sources = value
            return Reshaped(sources, shape)
        case Reshaped(inner, _):
            return Reshaped(inner, shape)
    return replace(value, shape=shape)  # type: ignore[type-var]


def concatenated(values: Sequence[Value]) -> Value:
    """Return values one below the other."""
    if len(values) == 1:
        return values[0]
    pieces, row = [], 0
    for value in values:
        pieces.append((value, row, 0))
        row += value.shape[0]
    shape = (row, *values[0].shape[1:])
    return Arranged(tuple(pieces), shape, widest([value.dtype for value in values]))


def block_diagonal(values: Sequence[Value | None], heights: Sequence[int]) -> Value:
    """Return matrices along a diagonal; ``None`` leaves rows of zeros and no columns.

    Args:
        values: The blocks, ``(height, columns, …)``.
        heights: Rows of each.
    """
    present = [value for value in values if value is not None]
    pieces, row, column = [], 0, 0
    for value, height in zip(values, heights, strict=True):
        if value is not None:
            pieces.append((value, row, column))
            column += value.shape[1]
        row += height
    shape = (row, column, *present[0].shape[2:])
    return Arranged(tuple(pieces), shape, widest([value.dtype for value in present]))
