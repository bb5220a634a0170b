"""What an output tensor is made of: plain descriptions, evaluated when it is written.

Most are stored bytes, perhaps seen through a transposed or cut view; those are moved without
arithmetic. The others name the stored tensors that they need and what is done with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

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
    "Reshaped",
    "Scaled",
    "Seen",
    "Stored",
    "Value",
    "is_power_of_two",
    "spec_of",
    "widest",
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


@dataclass(frozen=True, slots=True)
class Reshaped:
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


@dataclass(frozen=True, slots=True)
class Seen:
    """A part of a value, or a value turned, where no view of what is stored does it.

    Attributes:
        value: The whole.
        view: Called with its array; moves numbers without changing them.
        shape: Of what that returns.
    """

    value: Value
    view: Callable[[Array], Array]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.value.dtype

    def sources(self) -> Iterator[StoredTensor]:
        yield from self.value.sources()

    def evaluate(self) -> Array:
        return self.view(self.value.evaluate())

    @property
    def is_exact(self) -> bool:
        return self.value.is_exact

    @property
    def needs_torch(self) -> bool:
        return self.value.needs_torch


def is_power_of_two(factor: float) -> bool:
    """Whether multiplying by ``factor`` only moves exponents, or makes zero."""
    return abs(math.frexp(factor)[0]) in (0.0, 0.5)


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
