"""The leading part of a dense matrix, without its full decomposition.

Small matrices are decomposed exactly: by their singular values in float64, or by the
eigenvectors of the smaller Gram matrix, which has all singular values down to 1e-8 of the
largest. Others by block Krylov iteration (:mod:`loratool.math.krylov`).

The error of either is measured, for any U and ``P = UᵀΔ``, by
``‖Δ - U P‖² = ‖Δ‖² - ‖P‖² + ⟨UᵀU - 1, P Pᵀ⟩``, whose last term stands for what rounding has
taken from the orthonormality of U; and by forming ``Δ - U P`` where little of Δ is left and the
terms would cancel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from loratool.math.krylov import Krylov, basis_size
from loratool.math.lowrank import LowRank
from loratool.math.namespace import (
    Array,
    array_namespace,
    beside,
    double,
    is_on_host,
    on_host,
)
from loratool.math.namespace import squared_norm as _squares
from loratool.math.precision import Precision
from loratool.math.small import eigh, svd
from loratool.math.tiles import NeedsAllRowsError, RowTiles

__all__ = [
    "TINY",
    "Decomposition",
    "Leading",
    "leading_part",
    "noise_floor",
    "row_squares",
    "spacing_squares",
    "squared_norm",
    "sum_of_squares",
]

SUSPICIOUS: Final = 1e-4
"""Of the energy: by so much two ways to tell the residual may differ."""
LITTLE: Final = 3e-4
"""Of the energy: with less than this missing, what is missing is formed."""
NEARLY_ALL: Final = 1e-6
"""Of the energy: with less than this missing, the rounding of float32 sums begins to show."""
SMALL_SIDE: Final = 96
"""Matrices with a side up to this are decomposed exactly."""
LARGE_PART: Final = 0.75
"""Of the smaller side: from a basis of so many columns on the exact route is no slower."""
SVD_SIDE: Final = 96
"""Up to this the exact route is a plain SVD in float64."""
BLOCK_ELEMENTS: Final = 1 << 18
"""Elements of the blocks in which squares are summed in float64; they fit into a cache."""
DEVICE_BLOCK_ELEMENTS: Final = 1 << 22
"""The same on a GPU, which each block makes wait for the processor."""
GRAM_ROWS: Final = 1024
"""At least so many rows at a time go into a Gram matrix, which is read and written for each."""
TINY: Final = 1e-30
"""Of a square, on average: below it squares of float32 begin to vanish."""
NORMAL_32: Final = 2.0**-126
"""The smallest number of float32 that has all digits."""
EXPONENT_32: Final = 0x7F80_0000
EXPONENT_64: Final = 0x7FF0_0000_0000_0000
"""The bits of a floating-point number that hold its exponent."""


@dataclass(frozen=True)
class Leading:
    """The best (or nearly best) approximation of a matrix at some rank.

    Attributes:
        up: ``(m, k)``, ``U √S``.
        down: ``(k, n)``, ``√S Vᵀ``.
        singular_values: ``(k,)`` float64, descending.
        squared_norm: ``‖Δ‖_F²``.
        squared_residual: ``‖Δ - up @ down‖_F²``, measured.
        is_exact: Whether the singular values are those of Δ to rounding, not lower bounds.
    """

    up: Array
    down: Array
    singular_values: Array
    squared_norm: float
    squared_residual: float
    is_exact: bool

    @property
    def factors(self) -> LowRank:
        """The factors as a delta of scale 1."""
        return LowRank(self.up, self.down)


def leading_part(
    delta: Array, rank: int, generator: np.random.Generator, *, method: str = "auto"
) -> Leading:
    """Return the leading ``rank`` singular triples of ``delta``.

    Args:
        delta: ``(m, n)``, float32 or float64.
        rank: How many, at most the smaller side.
        generator: The randomised route draws from it, on the processor whatever the device.
        method: ``exact``, ``randomised``, or ``auto``: whichever is quicker.

    Raises:
        ValueError: The matrix is not finite.
    """
    return Decomposition(delta, generator, method=method).leading(rank)


class Decomposition:
    """Leading parts of one matrix; what is computed for one rank serves for larger ones.

    Args:
        delta: ``(m, n)``, float32 or float64.
        generator: The randomised route draws from it, on the processor whatever the device.
        method: ``exact``, ``randomised``, or ``auto``: whichever is quicker.
        squares: ``‖Δ‖_F²`` where it is known.

    Raises:
        ValueError: The matrix is not finite.
    """

    def __init__(
        self,
        delta: Array,
        generator: np.random.Generator,
        *,
        method: str = "auto",
        squares: float | None = None,
    ) -> None:
        # Rows that are contiguous are what a sketch adds up.
        self._is_turned = _is_column_major(delta)
        self._delta = delta.mT if self._is_turned else delta
        self._method = method
        self._total = squared_norm(self._delta) if squares is None else squares
        if not math.isfinite(self._total):
            raise ValueError("not finite")
        norm = math.sqrt(self._total)
        self._krylov = Krylov(self._delta, norm, generator) if norm else None
        self._exact: _Exact | None = None

    def leading(self, rank: int) -> Leading:
        """Return the leading ``rank`` singular triples, at most as many as the smaller side."""
        found = self._leading(min(rank, *self._delta.shape))
        return replace(found, up=found.down.mT, down=found.up.mT) if self._is_turned else found

    def _leading(self, rank: int) -> Leading:
        delta, total = self._delta, self._total
        if self._krylov is None:
            return self._zero(rank)
        side = min(delta.shape)
        size = basis_size(rank, delta.shape)
        is_small = side <= SMALL_SIDE or size >= LARGE_PART * side
        is_asked = self._method == "exact" or size > side
        if is_asked or (self._method == "auto" and is_small):
            return self._exactly(rank)
        U, P, values = self._krylov.leading(rank)
        captured, shift = _energies(U, P)
        residual = max(0.0, total - captured + float(shift @ values**2))
        known = beside(values, delta)
        up, down = _balanced(U, P, known)
        if residual < LITTLE * total:
            residual = _squared_residual(delta, up, down)
        if residual < NEARLY_ALL * total:
            up, down, known = _refined(delta, up)
            residual = _squared_residual(delta, up, down, in_double=True)
        if abs(total - _squares(known) - residual) > SUSPICIOUS * total:
            # Rounding has spoilt the basis: the two ways to tell the residual have to agree.
            return self._exactly(rank)
        return Leading(up, down, known, total, residual, is_exact=False)

    def _exactly(self, rank: int) -> Leading:
        if self._exact is None:
            self._exact = _Exact(self._delta)
        up, down, values = self._exact.leading(rank)
        residual = _squared_residual(self._delta, up, down)
        if residual < NEARLY_ALL * self._total:
            residual = _squared_residual(self._delta, up, down, in_double=True)
        return Leading(up, down, values, self._total, residual, is_exact=True)

    def _zero(self, rank: int) -> Leading:
        xp = array_namespace(self._delta)
        m, n = self._delta.shape
        kind = {"dtype": self._delta.dtype, "device": self._delta.device}
        up, down = xp.zeros((m, rank), **kind), xp.zeros((rank, n), **kind)
        return Leading(up, down, beside(np.zeros(rank), self._delta), 0.0, 0.0, is_exact=True)


def _is_column_major(matrix: Array) -> bool:
    """Whether columns are contiguous, and rows are not."""
    if isinstance(matrix, RowTiles):
        return bool(matrix.is_turned)
    if isinstance(matrix, np.ndarray):
        return matrix.flags.f_contiguous and not matrix.flags.c_contiguous
    strides: tuple[int, ...] = matrix.stride() if hasattr(matrix, "stride") else ()
    return len(strides) == 2 and strides[0] == 1 and strides[1] != 1


def _energies(left: Array, core: Array) -> tuple[float, np.ndarray]:
    """Return ``‖P‖²``, and by how much the squared norm of each column of U is above 1."""
    if isinstance(left, np.ndarray):
        return _squares(core), np.einsum("ij,ij->j", left, left, dtype=np.float64) - 1
    xp = array_namespace(left)
    columns, total = xp.sum(double(left) ** 2, axis=0), xp.sum(double(core) ** 2)
    both = on_host(xp.concat([columns, total[None]]))  # one wait for a GPU
    return float(both[-1]), both[:-1] - 1


def _balanced(left: Array, core: Array, values: Array) -> tuple[Array, Array]:
    """Return ``U √S`` and ``√S Vᵀ`` from U and ``P = S Vᵀ``."""
    xp = array_namespace(left)
    root = xp.sqrt(values)
    inverse = xp.where(root > 0, 1 / xp.where(root > 0, root, 1.0), 0.0)
    kind = left.dtype
    return left * xp.astype(root, kind), xp.astype(inverse, kind)[:, None] * core


def squared_norm(matrix: Array) -> float:
    """Return ``‖Δ‖_F²``; not finite where an element is not.

    It is good to some 1e-8 of the whole, and does not depend on where a matrix is cut into rows.
    """
    if isinstance(matrix, np.ndarray) and matrix.dtype == np.float32:
        return sum_of_squares(row_squares(matrix))
    return math.fsum(_squares(block) for _, block in _blocks(matrix))


@np.errstate(over="ignore", invalid="ignore")
def row_squares(matrix: np.ndarray) -> np.ndarray:
    """Return the squared norm of every row, ``(m,)`` in float64.

    Each is summed in the dtype of the matrix, and in float64 where that leaves its range.
    """
    found: np.ndarray = np.vecdot(matrix, matrix).astype(np.float64)
    is_doubtful = ~((found > TINY * matrix.shape[1]) & (found < math.inf))
    if is_doubtful.any():
        rows = matrix[is_doubtful]
        found[is_doubtful] = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return found


def sum_of_squares(squares: np.ndarray) -> float:
    """Return the sum of squares, rounded once; infinity where one is not finite."""
    return math.fsum(squares.tolist()) if np.isfinite(squares).all() else math.inf


@np.errstate(over="ignore")
def spacing_squares(stored: Array, precision: Precision | None = None) -> float:
    """Return the sum of the squared distances between the numbers beside each element.

    Args:
        stored: Values of a finetuned weight, in the dtype in which they were stored, or wider.
        precision: Of the dtype in which they were stored; default: that of ``stored``.
    """
    xp = array_namespace(stored)
    precision = precision or Precision.of(stored)
    is_wide = stored.dtype == xp.float64
    values = stored if is_wide else xp.astype(stored, xp.float32, copy=False)
    # The bits of the exponent alone are the power of two at or below a number.
    words = values.view(xp.int64 if is_wide else xp.int32)
    powers = (words & (EXPONENT_64 if is_wide else EXPONENT_32)).view(values.dtype)
    if precision.smallest > NORMAL_32:  # the squares of others vanish beside those of any weight
        powers = xp.clip(powers, min=precision.smallest)
    powers = powers if powers.ndim == 2 else powers.reshape(1, -1)
    total = squared_norm(powers)
    if not math.isfinite(total):  # infinities and NaN have no neighbours
        total = squared_norm(xp.where(xp.isfinite(powers), powers, 0.0))
    return total * precision.eps**2


def noise_floor(squares: float, count: int, shape: tuple[int, int]) -> float:
    """Return the largest singular value that rounding alone leaves in a difference.

    Rounding a value to its dtype errs by up to half the spacing of numbers there, evenly: a
    variance of spacing²/12. A random ``(m, n)`` matrix of deviation s has its largest singular
    value at ``s (√m + √n)`` (Bai & Yin 1993).

    Args:
        squares: The sum of :func:`spacing_squares` over elements of the finetuned weight.
        count: How many those are.
        shape: ``(m, n)``.
    """
    m, n = shape
    return math.sqrt(squares / max(1, count) / 12) * (math.sqrt(m) + math.sqrt(n))


def _blocks(matrix: Array, least: int = 1) -> Iterator[tuple[int, Array]]:
    """Yield rows, a few at a time but no fewer than ``least``, and the index of the first."""
    if isinstance(matrix, RowTiles):
        yield from matrix.tiles()
        return
    elements = BLOCK_ELEMENTS if is_on_host(matrix) else DEVICE_BLOCK_ELEMENTS
    rows = max(least, elements // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], rows):
        yield start, matrix[start : start + rows, :]


class _Exact:
    """All singular triples of a matrix, those of its Gram matrix where it is large.

    Args:
        delta: ``(m, n)``.
    """

    def __init__(self, delta: Array) -> None:
        if isinstance(delta, RowTiles):
            raise NeedsAllRowsError("an exact decomposition needs all rows at once")
        self._is_tall = delta.shape[0] > delta.shape[1] > SVD_SIDE
        self._delta = delta = delta.mT if self._is_tall else delta
        self._svd: tuple[Array, Array, Array] | None = None
        if min(delta.shape) <= SVD_SIDE:
            self._svd = svd(delta)
            return
        xp = array_namespace(delta)
        size = delta.shape[0]
        gram = xp.zeros((size, size), dtype=xp.float64, device=delta.device)
        for _, block in _blocks(delta.mT, GRAM_ROWS):
            wide = double(block)
            gram += wide.mT @ wide
        self._squares, self._vectors = eigh(gram)

    def leading(self, rank: int) -> tuple[Array, Array, Array]:
        """Return ``U √S``, ``√S Vᵀ`` in the dtype of the matrix, and S in float64."""
        kind = self._delta.dtype
        xp = array_namespace(self._delta)
        if self._svd is not None:
            U, S, Vh = self._svd
            root = xp.sqrt(S[:rank])
            up, down = U[:, :rank] * root, root[:, None] * Vh[:rank, :]
            return xp.astype(up, kind), xp.astype(down, kind), S[:rank]
        S, U = xp.sqrt(xp.clip(self._squares[:rank], min=0.0)), self._vectors[:, :rank]
        up, down = _balanced(U, _projected(self._delta, U), S)
        up, down = xp.astype(up, kind), xp.astype(down, kind)
        return (down.mT, up.mT, S) if self._is_tall else (up, down, S)


def _refined(delta: Array, up: Array) -> tuple[Array, Array, Array]:
    """Return the decomposition of Δ near the columns of ``up``, with products in float64.

    The rows that Δ has in those columns are a basis as good as float64; the columns themselves
    are no better than float32.
    """
    xp = array_namespace(up)
    Q, _ = xp.linalg.qr(double(up))
    P, _ = xp.linalg.qr(_projected(delta, Q).mT)
    U, S, Vh = svd(xp.concat([double(block) @ P for _, block in _blocks(delta)], axis=0))
    root = xp.sqrt(S)
    up, down = U * root, root[:, None] * (Vh @ P.mT)
    return xp.astype(up, delta.dtype), xp.astype(down, delta.dtype), S


def _projected(delta: Array, left: Array) -> Array:
    """Return ``leftᵀ Δ`` in float64."""
    xp = array_namespace(left)
    projected = xp.zeros((left.shape[1], delta.shape[1]), dtype=xp.float64, device=delta.device)
    for start, block in _blocks(delta):
        projected += left[start : start + block.shape[0], :].mT @ double(block)
    return projected


def _squared_residual(delta: Array, up: Array, down: Array, *, in_double: bool = False) -> float:
    """Return ``‖Δ - up @ down‖_F²``, by products in float64 where little is left of Δ."""
    if in_double:
        up, down = double(up), double(down)
    return math.fsum(
        _squares(block - up[start : start + block.shape[0], :] @ down)
        for start, block in _blocks(delta)
    )
