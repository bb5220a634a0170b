"""Expressions: a tensor that will exist, told by what it is made of.

Shape and dtype cost no I/O. Most expressions are stored bytes, perhaps seen through a turned or
cut view; those are moved without arithmetic. The others are evaluated in float64 when they are
written. Views are methods, and every expression has all of them: where none fits the form, the
view is an expression of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = [
    "Constant",
    "Cut",
    "Exchanged",
    "Expr",
    "Function",
    "Held",
    "Mean",
    "Piled",
    "Placed",
    "Reshaped",
    "Result",
    "Results",
    "Scaled",
    "Stored",
    "Taken",
    "Together",
    "Turned",
    "block_diagonal",
    "computed_dtype",
    "concatenated",
    "contiguous_strides",
    "evaluated",
    "is_power_of_two",
    "sources",
    "spec_of",
    "togethers",
    "widest",
]


class Together(Protocol):
    """Tensors that are computed as a whole, such as both factors of a truncated sum.

    Attributes:
        name: What they are computed for.
    """

    @property
    def name(self) -> str: ...
    @property
    def tensors(self) -> Sequence[StoredTensor]:
        """What they are computed from."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that computing them goes through, roughly: read, or of a matrix it forms."""
        ...

    def compute(self) -> tuple[tuple[Array, ...], Any]:
        """Compute all of them, float64, and report how well they stand for what they should.

        Raises:
            LoratoolError: An input is broken, or not finite.
        """
        ...


Results = Mapping[int, tuple[Any, ...]]
"""What is computed already: the identity of a :class:`Together`, and its tensors."""
NOTHING: Final[Results] = {}


class Expr:
    """A tensor that will exist."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def shape(self) -> tuple[int, ...]:
            """Its shape."""

        @property
        def dtype(self) -> str:
            """The dtype of what it is made of, as a header calls it."""

    def parts(self) -> tuple[Expr, ...]:
        """Return what it is made of."""
        return ()

    def evaluate(self, results: Results = NOTHING) -> Array:
        """Read and compute it, float64.

        Args:
            results: The tensors of every :class:`Together` that it refers to.
        """
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Expr:
        """Return rows ``start`` to ``stop``."""
        if (start, stop) == (0, self.shape[0]):
            return self
        return self._cut(0, start, stop)

    def columns(self, start: int, stop: int) -> Expr:
        """Return columns ``start`` to ``stop``."""
        if (start, stop) == (0, self.shape[1]):
            return self
        return self._cut(1, start, stop)

    def turned(self) -> Expr:
        """Return a matrix with rows and columns exchanged."""
        return self._turned()

    def reshaped(self, shape: tuple[int, ...]) -> Expr:
        """Return the same numbers, in row-major order, in another shape."""
        return self if shape == self.shape else self._reshaped(shape)

    def scaled(self, factor: float) -> Expr:
        """Return it times ``factor``."""
        return self if factor == 1 else Scaled(self, factor)

    def exchanged(self, axes: tuple[int, int, int]) -> Expr:
        """Return its rows, seen as ``(*axes, …)``, with the last two of ``axes`` exchanged."""
        return Exchanged(self, axes)

    def _cut(self, axis: int, start: int, stop: int) -> Expr:
        return Cut(self, axis, start, stop)

    def _turned(self) -> Expr:
        return Turned(self)

    def _reshaped(self, shape: tuple[int, ...]) -> Expr:
        return Reshaped(self, shape)


@dataclass(frozen=True, slots=True)
class Stored(Expr):
    """A stored tensor, as it is or through a view of its bytes."""

    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.spec.shape

    @property
    def dtype(self) -> str:
        dtype = self.tensor.spec.dtype
        return "F32" if DTYPES[dtype].block else dtype

    def evaluate(self, results: Results = NOTHING) -> Array:
        from loratool.values.arrays import decode

        return decode(self.tensor)

    @property
    def is_viewed(self) -> bool:
        """Whether parts of it are views of its bytes."""
        tensor = self.tensor
        return tensor.steps is None and DTYPES[tensor.spec.dtype].block is None

    @property
    def _strides(self) -> tuple[int, ...]:
        return self.tensor.strides or contiguous_strides(self.shape)

    def exchanged(self, axes: tuple[int, int, int]) -> Expr:
        tensor = self.tensor.exchanging(axes)
        return Stored(tensor) if tensor is not None else Exchanged(self, axes)

    def _cut(self, axis: int, start: int, stop: int) -> Expr:
        if not self.is_viewed:
            return Cut(self, axis, start, stop)
        shape = list(self.shape)
        shape[axis] = stop - start
        return self._view(tuple(shape), self._strides, start * self._strides[axis])

    def _turned(self) -> Expr:
        if not self.is_viewed:
            return Turned(self)
        rows, columns = self.shape
        return self._view((columns, rows), self._strides[::-1], 0)

    def _reshaped(self, shape: tuple[int, ...]) -> Expr:
        if self.tensor.strides is not None or not self.is_viewed:
            return Reshaped(self, shape)
        return Stored(replace(self.tensor, spec=replace(self.tensor.spec, shape=shape)))

    def _view(self, shape: tuple[int, ...], strides: tuple[int, ...], begin: int) -> Stored:
        tensor = self.tensor
        is_flat = strides == contiguous_strides(shape)
        return Stored(
            replace(
                tensor,
                spec=replace(tensor.spec, shape=shape),
                offset=tensor.offset + DTYPES[tensor.spec.dtype].size(begin),
                strides=None if is_flat else strides,
            )
        )


@dataclass(frozen=True, slots=True)
class Scaled(Expr):
    """An expression times a number."""

    value: Expr
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> str:
        return computed_dtype([self.value.dtype])

    def parts(self) -> tuple[Expr, ...]:
        return (self.value,)

    def evaluate(self, results: Results = NOTHING) -> Array:
        return self.value.evaluate(results) * self.factor

    def _cut(self, axis: int, start: int, stop: int) -> Expr:
        return Scaled(self.value._cut(axis, start, stop), self.factor)

    def _turned(self) -> Expr:
        return Scaled(self.value._turned(), self.factor)

    def _reshaped(self, shape: tuple[int, ...]) -> Expr:
        return Scaled(self.value._reshaped(shape), self.factor)


@dataclass(frozen=True, slots=True)
class Constant(Expr):
    """One number, everywhere."""

    number: float
    shape: tuple[int, ...]
    dtype: str

    def evaluate(self, results: Results = NOTHING) -> Array:
        import numpy as np

        return np.full(self.shape, self.number, dtype=np.float64)

    def _cut(self, axis: int, start: int, stop: int) -> Expr:
        shape = list(self.shape)
        shape[axis] = stop - start
        return replace(self, shape=tuple(shape))

    def _turned(self) -> Expr:
        return replace(self, shape=self.shape[::-1])

    def _reshaped(self, shape: tuple[int, ...]) -> Expr:
        return replace(self, shape=shape)


@dataclass(frozen=True, slots=True)
class Placed(Expr):
    """Matrices at places of a larger one that is zero elsewhere.

    Attributes:
        pieces: Expressions with the row and the column of their first element.
        shape: Of the whole; dimensions beyond the second are those of the pieces.
        dtype: Of the whole.
    """

    pieces: tuple[tuple[Expr, int, int], ...]
    shape: tuple[int, ...]
    dtype: str

    def parts(self) -> tuple[Expr, ...]:
        return tuple(piece for piece, _, _ in self.pieces)

    def evaluate(self, results: Results = NOTHING) -> Array:
        import numpy as np

        whole = np.zeros(self.shape, dtype=np.float64)
        for value, row, column in self.pieces:
            part = value.evaluate(results)
            if part.ndim == 1:
                whole[row : row + part.shape[0]] = part
            else:
                whole[row : row + part.shape[0], column : column + part.shape[1]] = part
        return whole

    def _cut(self, axis: int, start: int, stop: int) -> Expr:
        shape = list(self.shape)
        shape[axis] = stop - start
        kept = []
        for piece, row, column in self.pieces:
            place = (row, column)[axis]
            first, last = max(start, place), min(stop, place + piece.shape[axis])
            if first < last:
                part = piece.rows if axis == 0 else piece.columns
                seen = part(first - place, last - place)
                kept.append(
                    (seen, first - start, column) if axis == 0 else (seen, row, first - start)
                )
        if len(kept) == 1 and kept[0][0].shape == tuple(shape):
            return kept[0][0]
        return Placed(tuple(kept), tuple(shape), self.dtype)

    def _turned(self) -> Expr:
        turned = tuple((piece.turned(), column, row) for piece, row, column in self.pieces)
        return Placed(turned, self.shape[::-1], self.dtype)


@dataclass(frozen=True, slots=True)
class Piled(Expr):
    """Tensors of one shape, one after the other along a new first dimension."""

    values: tuple[Expr, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.values), *self.values[0].shape)

    @property
    def dtype(self) -> str:
        return widest([value.dtype for value in self.values])

    def parts(self) -> tuple[Expr, ...]:
        return self.values

    def evaluate(self, results: Results = NOTHING) -> Array:
        import numpy as np

        return np.stack([value.evaluate(results) for value in self.values])


@dataclass(frozen=True, slots=True)
class Mean(Expr):
    """The mean of tensors of one shape, or of rows of them.

    Attributes:
        values: The tensors.
        rows_of: For each row of the result, which tensors and which of their rows it is the
            mean of; empty for the mean of the tensors as a whole.
        dtype: Of the result.
    """

    values: tuple[Expr, ...]
    rows_of: tuple[tuple[tuple[int, int], ...], ...]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.values[0].shape
        return (len(self.rows_of), *first[1:]) if self.rows_of else first

    def parts(self) -> tuple[Expr, ...]:
        return self.values

    def evaluate(self, results: Results = NOTHING) -> Array:
        import numpy as np

        arrays = [value.evaluate(results) for value in self.values]
        if not self.rows_of:
            mean: Array = np.mean(np.stack(arrays), axis=0)
            return mean
        return np.stack(
            [np.mean([arrays[n][row] for n, row in places], axis=0) for places in self.rows_of]
        )


@dataclass(frozen=True, eq=False)
class Function:
    """A function of stored tensors that returns several at once.

    Attributes:
        name: What it is, for people.
        tensors: What it is called with, as float64 arrays.
        function: The function.
    """

    name: str
    tensors: tuple[StoredTensor, ...]
    function: Callable[..., tuple[Array, ...]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.spec.nbytes for tensor in self.tensors)

    def compute(self) -> tuple[tuple[Array, ...], None]:
        return self.function(*(Stored(tensor).evaluate() for tensor in self.tensors)), None


@dataclass(frozen=True, slots=True)
class Result(Expr):
    """One tensor of several that are computed together."""

    of: Together
    index: int
    shape: tuple[int, ...]
    dtype: str

    def evaluate(self, results: Results = NOTHING) -> Array:
        made: Array = results[id(self.of)][self.index]
        return made.reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Held(Expr):
    """A tensor in memory, such as that of a live layer.

    Attributes:
        read: Returns its numbers as they are now, float64.
        shape: Its shape.
        dtype: Its dtype, as a header calls it.
    """

    read: Callable[[], Array]
    shape: tuple[int, ...]
    dtype: str

    def evaluate(self, results: Results = NOTHING) -> Array:
        return self.read().reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Cut(Expr):
    """Part of an expression along its first or second dimension."""

    value: Expr
    axis: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.value.shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape)

    @property
    def dtype(self) -> str:
        return self.value.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.value,)

    def evaluate(self, results: Results = NOTHING) -> Array:
        array = self.value.evaluate(results)
        return array[(slice(None),) * self.axis + (slice(self.start, self.stop),)]


@dataclass(frozen=True, slots=True)
class Turned(Expr):
    """An expression with rows and columns exchanged, where no view does it."""

    value: Expr

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape[::-1]

    @property
    def dtype(self) -> str:
        return self.value.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.value,)

    def evaluate(self, results: Results = NOTHING) -> Array:
        return self.value.evaluate(results).T

    def _turned(self) -> Expr:
        return self.value


@dataclass(frozen=True, slots=True)
class Exchanged(Expr):
    """A matrix whose rows, seen as ``(n, a, b, …)``, have the axes a and b exchanged."""

    value: Expr
    axes: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> str:
        return self.value.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.value,)

    def evaluate(self, results: Results = NOTHING) -> Array:
        values = self.value.evaluate(results)
        seen = values.reshape(*self.axes, -1).transpose(0, 2, 1, 3)
        return seen.reshape(values.shape)


@dataclass(frozen=True, slots=True)
class Taken(Expr):
    """Some rows of an expression, in any order."""

    value: Expr
    indices: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.indices), *self.value.shape[1:])

    @property
    def dtype(self) -> str:
        return self.value.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.value,)

    def evaluate(self, results: Results = NOTHING) -> Array:
        return self.value.evaluate(results)[list(self.indices)]


@dataclass(frozen=True, slots=True)
class Reshaped(Expr):
    """An expression in another shape, where no view does it."""

    value: Expr
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.value.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.value,)

    def evaluate(self, results: Results = NOTHING) -> Array:
        return self.value.evaluate(results).reshape(self.shape)

    def _reshaped(self, shape: tuple[int, ...]) -> Expr:
        return self.value.reshaped(shape)


def concatenated(values: Sequence[Expr]) -> Expr:
    """Return expressions one below the other."""
    if len(values) == 1:
        return values[0]
    pieces, row = [], 0
    for value in values:
        pieces.append((value, row, 0))
        row += value.shape[0]
    shape = (row, *values[0].shape[1:])
    return Placed(tuple(pieces), shape, widest([value.dtype for value in values]))


def block_diagonal(values: Sequence[Expr | None], heights: Sequence[int]) -> Expr:
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
    return Placed(tuple(pieces), shape, widest([value.dtype for value in present]))


def sources(value: Expr) -> Iterator[StoredTensor]:
    """Yield the stored tensors that an expression is made of."""
    if isinstance(value, Stored):
        yield value.tensor
    elif isinstance(value, Result):
        yield from value.of.tensors
    for part in value.parts():
        yield from sources(part)


def togethers(value: Expr) -> Iterator[Together]:
    """Yield what an expression needs to have computed first."""
    if isinstance(value, Result):
        yield value.of
    for part in value.parts():
        yield from togethers(part)


def evaluated(values: Sequence[Expr]) -> list[Array]:
    """Return expressions as arrays, float64; what they share is computed once."""
    needed = {id(each): each for value in values for each in togethers(value)}
    results = {key: each.compute()[0] for key, each in needed.items()}
    return [value.evaluate(results) for value in values]


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the element strides of a tensor in row-major order."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def is_power_of_two(factor: float) -> bool:
    """Whether multiplying by ``factor`` only moves exponents, or makes zero."""
    return abs(math.frexp(factor)[0]) in (0.0, 0.5)


def widest(dtypes: Sequence[str]) -> str:
    """Return the dtype that holds all of ``dtypes``; float32 for both halves, and for blocks."""
    unique = {"F32" if DTYPES[name].block else name for name in dtypes}
    if len(unique) == 1:
        return unique.pop()
    if all(DTYPES[name].is_float and DTYPES[name].bits == 8 for name in unique):
        return "BF16"
    if unique == {"F16", "BF16"}:
        return "F32"
    return max(unique, key=lambda name: DTYPES[name].bits)


def computed_dtype(dtypes: Sequence[str]) -> str:
    """Return the dtype for numbers computed from ``dtypes``: never one of 8 bits."""
    found = widest(dtypes)
    is_narrow = DTYPES[found].is_float and DTYPES[found].bits < 16
    return "BF16" if is_narrow else found


def spec_of(name: str, value: Expr, dtype: str | None = None) -> TensorSpec:
    """Return what an expression is once it is stored under ``name``."""
    is_float = DTYPES[value.dtype].is_float
    return TensorSpec(name, dtype if dtype and is_float else value.dtype, value.shape)
