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
    Piled,
    Reshaped,
    Scaled,
    Seen,
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
        case Constant(number, _, dtype):
            return Constant(number, shape, dtype)
        case Arranged(pieces):
            return _cut_pieces(pieces, (start, stop), (0, _width(value)), shape, value.dtype)
        case Piled(values) if start < stop:
            return Piled(values[start:stop])
        case Reshaped(inner, _) if inner.shape[:1] == value.shape[:1]:
            return reshaped(rows(inner, start, stop), shape)
    return Seen(value, lambda whole: whole[start:stop], shape)


def columns(value: Value, start: int, stop: int) -> Value:
    """Return columns ``start`` to ``stop``; a view where the value is stored."""
    shape = (value.shape[0], stop - start, *value.shape[2:])
    if shape == value.shape:
        return value
    match value:
        case Stored(tensor):
            return Stored(_cut(tensor, 0, start, shape))
        case Scaled(inner, factor):
            return Scaled(columns(inner, start, stop), factor)
        case Constant(number, _, dtype):
            return Constant(number, shape, dtype)
        case Arranged(pieces):
            return _cut_pieces(pieces, (0, value.shape[0]), (start, stop), shape, value.dtype)
        case Piled(values):
            return Piled(tuple(rows(one, start, stop) for one in values))
        case Reshaped(inner, _) if inner.shape[:2] == value.shape[:2]:
            return reshaped(columns(inner, start, stop), shape)
    return Seen(value, lambda whole: whole[:, start:stop], shape)


def _width(value: Value) -> int:
    """Return how many columns a value has; vectors have one."""
    return value.shape[1] if len(value.shape) > 1 else 1


def _cut_pieces(
    pieces: Sequence[tuple[Value, int, int]],
    down: tuple[int, int],
    across: tuple[int, int],
    shape: tuple[int, ...],
    dtype: str,
) -> Value:
    """Return what lies in the rows ``down`` and the columns ``across``, both from and to."""
    kept = []
    for piece, row, column in pieces:
        top, bottom = max(down[0], row), min(down[1], row + piece.shape[0])
        left, right = max(across[0], column), min(across[1], column + _width(piece))
        if top < bottom and left < right:
            part = rows(piece, top - row, bottom - row)
            if len(piece.shape) > 1:
                part = columns(part, left - column, right - column)
            kept.append((part, top - down[0], left - across[0]))
    if len(kept) == 1 and kept[0][0].shape == shape:
        return kept[0][0]
    return Arranged(tuple(kept), shape, dtype)


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
    height, width = value.shape
    match value:
        case Stored(tensor):
            return Stored(_plain(transposed(tensor)))
        case Scaled(inner, factor):
            return Scaled(flipped(inner), factor)
        case Constant(number, _, dtype):
            return Constant(number, (width, height), dtype)
        case Arranged(pieces, _, dtype):
            turned = tuple((flipped(piece), column, row) for piece, row, column in pieces)
            return Arranged(turned, (width, height), dtype)
    return Seen(value, lambda whole: whole.T, (width, height))


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
        case Scaled(inner, factor):
            return Scaled(reshaped(inner, shape), factor)
        case Constant(number, _, dtype):
            return Constant(number, shape, dtype)
        case Computed():
            return replace(value, shape=shape)
        case Reshaped(inner, _):
            return reshaped(inner, shape)
    return Reshaped(value, shape)


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
