"""What an output tensor is made of: plain descriptions, evaluated when it is written.

Most are stored bytes, perhaps seen through a transposed or cut view; those are moved without
arithmetic. The others name the stored tensors that they need and what is done with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

from loratool.adapter.scheme import transposed
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from loratool.ops.conversion.arrays import Array

__all__ = [
    "Arranged",
    "Computed",
    "Constant",
    "Piled",
    "Scaled",
    "Stored",
    "Value",
    "block_diagonal",
    "columns",
    "concatenated",
    "flipped",
    "is_power_of_two",
    "reshaped",
    "rows",
    "scaled",
]


NUMPY_DTYPES: Final = ("F64", "F32", "F16", "BF16")


class Value(Protocol):
    """A tensor that will exist.

    Attributes:
        shape: Its shape.
        dtype: The dtype of what it is made of, as a header calls it.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    def sources(self) -> Iterator[StoredTensor]:
        """Yield the stored tensors that it is made of."""
        ...

    def evaluate(self) -> Array:
        """Read and compute it in float64."""
        ...

    @property
    def is_exact(self) -> bool:
        """Whether every number of it is a stored one, zero, or that times a power of two."""
        ...

    @property
    def needs_torch(self) -> bool:
        """Whether numpy alone does not compute it."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored tensor, as it is or through a view."""

    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.spec.shape

    @property
    def dtype(self) -> str:
        return self.tensor.spec.dtype

    def sources(self) -> Iterator[StoredTensor]:
        yield self.tensor

    def evaluate(self) -> Array:
        from loratool.ops.conversion.arrays import decode

        return decode(self.tensor)

    @property
    def is_exact(self) -> bool:
        return True

    @property
    def needs_torch(self) -> bool:
        return self.dtype not in NUMPY_DTYPES


@dataclass(frozen=True, slots=True)
class Scaled:
    """A value times a number."""

    value: Value
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> str:
        return self.value.dtype

    def sources(self) -> Iterator[StoredTensor]:
        yield from self.value.sources()

    def evaluate(self) -> Array:
        return self.value.evaluate() * self.factor

    @property
    def is_exact(self) -> bool:
        return is_power_of_two(self.factor) and self.value.is_exact

    @property
    def needs_torch(self) -> bool:
        return self.value.needs_torch


@dataclass(frozen=True, slots=True)
class Constant:
    """One number, everywhere."""

    number: float
    shape: tuple[int, ...]
    dtype: str

    def sources(self) -> Iterator[StoredTensor]:
        yield from ()

    def evaluate(self) -> Array:
        import numpy as np

        return np.full(self.shape, self.number, dtype=np.float64)

    @property
    def is_exact(self) -> bool:
        return True

    @property
    def needs_torch(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Arranged:
    """Matrices at places of a larger one that is zero elsewhere.

    Attributes:
        pieces: Values with the row and the column of their first element.
        shape: Of the whole; dimensions beyond the second are those of the pieces.
        dtype: Of the whole.
    """

    pieces: tuple[tuple[Value, int, int], ...]
    shape: tuple[int, ...]
    dtype: str

    def sources(self) -> Iterator[StoredTensor]:
        for value, _, _ in self.pieces:
            yield from value.sources()

    def evaluate(self) -> Array:
        import numpy as np

        whole = np.zeros(self.shape, dtype=np.float64)
        for value, row, column in self.pieces:
            part = value.evaluate()
            if part.ndim == 1:
                whole[row : row + part.shape[0]] = part
            else:
                whole[row : row + part.shape[0], column : column + part.shape[1]] = part
        return whole

    @property
    def is_exact(self) -> bool:
        return all(value.is_exact for value, _, _ in self.pieces)

    @property
    def needs_torch(self) -> bool:
        return any(value.needs_torch for value, _, _ in self.pieces)


@dataclass(frozen=True, slots=True)
class Piled:
    """Matrices of one shape, one after the other along a new first dimension."""

    values: tuple[Value, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.values), *self.values[0].shape)

    @property
    def dtype(self) -> str:
        return widest([value.dtype for value in self.values])

    def sources(self) -> Iterator[StoredTensor]:
        for value in self.values:
            yield from value.sources()

    def evaluate(self) -> Array:
        import numpy as np

        return np.stack([value.evaluate() for value in self.values])

    @property
    def is_exact(self) -> bool:
        return all(value.is_exact for value in self.values)

    @property
    def needs_torch(self) -> bool:
        return any(value.needs_torch for value in self.values)


@dataclass(frozen=True, slots=True)
class Computed:
    """What a function makes of stored tensors, such as one factor of a Hadamard product.

    Attributes:
        name: What it is, for people.
        tensors: What it is made of.
        function: Called with them in float64.
        shape: Of the result.
        dtype: Of the result when it is written.
    """

    name: str
    tensors: tuple[StoredTensor, ...]
    function: Callable[..., Tensor]
    shape: tuple[int, ...]
    dtype: str

    def sources(self) -> Iterator[StoredTensor]:
        yield from self.tensors

    def evaluate(self) -> Array:
        from loratool.ops.tensors import read_tensor

        made = self.function(*(read_tensor(tensor).double() for tensor in self.tensors))
        values: Array = made.double().numpy()
        return values.reshape(self.shape)

    @property
    def is_exact(self) -> bool:
        return False

    @property
    def needs_torch(self) -> bool:
        return True


def is_power_of_two(factor: float) -> bool:
    """Whether multiplying by ``factor`` only moves exponents, or makes zero."""
    return abs(math.frexp(factor)[0]) in (0.0, 0.5)


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
            return _Reshaped(sources, shape)
        case _Reshaped(inner, _):
            return _Reshaped(inner, shape)
    return replace(value, shape=shape)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class _Reshaped:
    """A value in another shape, where no view does it."""

    value: Value
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.value.dtype

    def sources(self) -> Iterator[StoredTensor]:
        yield from self.value.sources()

    def evaluate(self) -> Array:
        return self.value.evaluate().reshape(self.shape)

    @property
    def is_exact(self) -> bool:
        return self.value.is_exact

    @property
    def needs_torch(self) -> bool:
        return self.value.needs_torch


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


def widest(dtypes: Sequence[str]) -> str:
    """Return the dtype that holds all of ``dtypes``; float32 for both halves."""
    unique = set(dtypes)
    if len(unique) == 1:
        return unique.pop()
    if unique == {"F16", "BF16"}:
        return "F32"
    return max(unique, key=lambda name: DTYPES[name].bits)


def spec_of(name: str, value: Value, dtype: str | None = None) -> TensorSpec:
    """Return what a value is once it is stored under ``name``."""
    is_float = DTYPES[value.dtype].is_float
    return TensorSpec(name, dtype if dtype and is_float else value.dtype, value.shape)
