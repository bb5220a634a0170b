"""The leading part of a dense matrix, without its full decomposition.

The randomised route is block Krylov iteration (Halko, Martinsson & Tropp 2011; Musco & Musco
2015): blocks ``Q_j`` spanning ``ΔΩ, (ΔΔᵀ)ΔΩ, …`` are made orthonormal as they come, each
``C_j = Q_jᵀΔ`` serves both for the projection and for the next block, and the iteration ends
when the captured energy stops growing. It reaches the accuracy of plain power iteration in a
fraction of the products. The exact route is an eigendecomposition of the smaller Gram matrix in
float64, which has all singular values down to 1e-8 of the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from loratool.math.lowrank import LowRank
from loratool.math.namespace import (
    Array,
    array_namespace,
    beside,
    double,
    is_on_host,
    on_host,
    padded,
)
from loratool.math.namespace import squared_norm as _squares
from loratool.math.precision import Precision
from loratool.math.small import eigh, svd

__all__ = ["Leading", "leading_part", "noise_floor", "spacing_squares", "squared_norm"]

OVERSAMPLING: Final = 8
LEAST_BLOCKS: Final = 2
MOST_BLOCKS: Final = 9
GROWTH: Final = 1e-3
"""The iteration ends when a block adds less than this share of what is still missing."""
NEGLIGIBLE: Final = 1e-13
"""Of the energy: what is missing is then the rounding of float32."""
DEAD: Final = 1e-5
"""Of the largest column: what a projection leaves that is smaller is rounding of float32."""
SUSPICIOUS: Final = 1e-4
"""Of the energy: by so much two ways to tell the residual may differ."""
NEARLY_ALL: Final = 1e-6
"""Of the energy: with less than this missing, the rounding of float32 sums begins to show."""
SMALLEST: Final = 1e-9
LARGEST: Final = 1e9
SMALL_SIDE: Final = 256
"""Matrices with a side up to this are decomposed exactly."""
SVD_SIDE: Final = 512
"""Up to this the exact route is a plain SVD in float64."""
BLOCK_ELEMENTS: Final = 1 << 18
"""Elements of the blocks in which squares are summed in float64; they fit into a cache."""
DEVICE_BLOCK_ELEMENTS: Final = 1 << 26
"""The same on a GPU, which each block makes wait for the processor."""
GRAM_ROWS: Final = 1024
"""At least so many rows at a time go into a Gram matrix, which is read and written for each."""
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
        squared_residual: ``‖Δ - up @ down‖_F²``, measured, not derived.
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
    peak = _peak(delta)
    if not math.isfinite(peak):
        raise ValueError("not finite")
    rank = min(rank, *delta.shape)
    if peak and not SMALLEST <= peak <= LARGEST:
        # Squares of squares would leave the range of float32.
        scaled = leading_part(delta / peak, rank, generator, method=method)
        root = math.sqrt(peak)
        return Leading(
            scaled.up * root,
            scaled.down * root,
            scaled.singular_values * peak,
            scaled.squared_norm * peak**2,
            scaled.squared_residual * peak**2,
            scaled.is_exact,
        )
    total = squared_norm(delta)
    wide = OVERSAMPLING + rank
    is_small = min(delta.shape) <= max(SMALL_SIDE, 4 * wide)
    is_exact = method == "exact" or (method == "auto" and is_small) or wide >= min(delta.shape)
    up, down, values = _exact(delta, rank) if is_exact else _krylov(delta, rank, total, generator)
    residual = _squared_residual(delta, up, down)
    if residual < NEARLY_ALL * total:
        if not is_exact:
            up, down, values = _refined(delta, up)
        residual = _squared_residual(delta, up, down, in_double=True)
    if not is_exact and abs(total - _squares(values) - residual) > SUSPICIOUS * total:
        # Rounding has spoilt the basis: the two ways to tell the residual have to agree.
        up, down, values = _exact(delta, rank)
        residual, is_exact = _squared_residual(delta, up, down), True
    return Leading(up, down, values, total, residual, is_exact)


def _peak(matrix: Array) -> float:
    """Return the largest absolute value, not finite where any element is not; no copy is made."""
    if 0 in matrix.shape:
        return 0.0
    xp = array_namespace(matrix)
    least, largest = float(xp.min(matrix)), float(xp.max(matrix))
    return max(-least, largest) if math.isfinite(least - largest) else math.inf


def squared_norm(matrix: Array) -> float:
    """Return ``‖Δ‖_F²``, summed in float64 block by block."""
    return math.fsum(_squares(block) for _, block in _blocks(matrix))


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
    powers = xp.clip(powers, min=precision.smallest)
    total = _squares(powers)
    if not math.isfinite(total):  # infinities and NaN have no neighbours
        total = _squares(xp.where(xp.isfinite(powers), powers, 0.0))
    return total * precision.eps**2


def noise_floor(squares: float, shape: tuple[int, int]) -> float:
    """Return the largest singular value that rounding alone leaves in a difference.

    Rounding a value to its dtype errs by up to half the spacing of numbers there, evenly: a
    variance of spacing²/12. A random ``(m, n)`` matrix of deviation s has its largest singular
    value at ``s (√m + √n)`` (Bai & Yin 1993).

    Args:
        squares: The sum of :func:`spacing_squares` over the finetuned weight.
        shape: ``(m, n)``.
    """
    m, n = shape
    return math.sqrt(squares / max(1, m * n) / 12) * (math.sqrt(m) + math.sqrt(n))


def _blocks(matrix: Array, least: int = 1) -> Iterator[tuple[int, Array]]:
    """Yield rows, a few at a time but no fewer than ``least``, and the index of the first."""
    elements = BLOCK_ELEMENTS if is_on_host(matrix) else DEVICE_BLOCK_ELEMENTS
    rows = max(least, elements // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], rows):
        yield start, matrix[start : start + rows, :]


def _exact(delta: Array, rank: int) -> tuple[Array, Array, Array]:
    xp = array_namespace(delta)
    m, n = delta.shape
    if min(m, n) <= SVD_SIDE:
        U, S, Vh = svd(delta)
        root = xp.sqrt(S[:rank])
        up, down = U[:, :rank] * root, root[:, None] * Vh[:rank, :]
        return xp.astype(up, delta.dtype), xp.astype(down, delta.dtype), S[:rank]
    if m > n:
        up, down, S = _exact(delta.mT, rank)
        return down.mT, up.mT, S
    gram = xp.zeros((m, m), dtype=xp.float64, device=delta.device)
    for _, block in _blocks(delta.mT, GRAM_ROWS):
        wide = double(block)
        gram += wide.mT @ wide
    squares, vectors = eigh(gram)
    squares, vectors = xp.clip(squares[:rank], min=0.0), vectors[:, :rank]
    up, down, S = _from_basis(vectors, _projected(delta, vectors), xp.sqrt(squares))
    return xp.astype(up, delta.dtype), xp.astype(down, delta.dtype), S


def _krylov(
    delta: Array, rank: int, total: float, generator: np.random.Generator
) -> tuple[Array, Array, Array]:
    xp = array_namespace(delta)
    m, n = delta.shape
    width = min(rank + OVERSAMPLING, m, n)
    kind = np.float64 if delta.dtype == xp.float64 else np.float32
    start = xp.astype(beside(generator.standard_normal((n, width), kind), delta), delta.dtype)
    basis = _new_directions(delta @ start, None)
    newest = cores = basis.mT @ delta
    gram = _products(cores, cores)
    captured = 0.0
    for number in range(1, MOST_BLOCKS + 1):
        energy = float(np.linalg.eigvalsh(gram).clip(min=0.0)[-rank:].sum())
        missing = total - energy
        is_stalled = energy - captured <= GROWTH * missing
        if missing <= NEGLIGIBLE * total or number == MOST_BLOCKS:
            break
        if number >= LEAST_BLOCKS and is_stalled:
            break
        captured = energy
        block = _new_directions(delta @ newest.mT, basis)
        if not block.shape[1]:
            break  # nothing is left that products with Δ could reach
        if basis.shape[1] + block.shape[1] > min(m, n):
            return _exact(delta, rank)
        newest = block.mT @ delta
        basis = xp.concat([basis, block], axis=1)
        between = _products(cores, newest)
        gram = np.block([[gram, between], [between.T, _products(newest, newest)]])
        cores = xp.concat([cores, newest], axis=0)
    squares, vectors = eigh(gram)
    values = beside(np.sqrt(squares[:rank].clip(min=0.0)), delta)
    turn = xp.astype(beside(vectors[:, :rank], delta), delta.dtype)
    up, down, values = _from_basis(basis @ turn, turn.mT @ cores, values)
    up, down = padded(up, m, rank), padded(down, rank, n)
    return up, down, padded(values[:, None], rank, 1)[:, 0]


def _new_directions(block: Array, basis: Array | None) -> Array:
    """Return orthonormal columns for what ``block`` has beside ``basis``, dead ones left out.

    Columns that are nearly zero after the projection are only rounding; made orthonormal they
    would point anywhere, also back into the basis. The second pass makes up for what the
    rounding of the first has left: of the basis, where blocks nearly repeat, and of the Gram
    matrix, which squares the condition number.
    """
    xp = array_namespace(block)
    reach = float(xp.max(xp.sum(double(block) ** 2, axis=0)))
    for _ in range(2):
        if basis is not None:
            block = block - basis @ (basis.mT @ block)
        squares, turn = eigh(_products(block.mT, block.mT))
        alive = squares > DEAD**2 * reach
        turn = beside(turn[:, alive] / np.sqrt(squares[alive]), block)
        block = xp.astype(double(block) @ turn, block.dtype)
        reach = 1.0
    return block


def _refined(delta: Array, up: Array) -> tuple[Array, Array, Array]:
    """Return the decomposition of Δ near the columns of ``up``, with products in float64.

    The rows that Δ has in those columns are a basis as good as float64; the columns themselves
    are no better than float32.
    """
    xp = array_namespace(delta)
    Q, _ = xp.linalg.qr(double(up))
    P, _ = xp.linalg.qr(_projected(delta, Q).mT)
    U, S, Vh = svd(xp.concat([double(block) @ P for _, block in _blocks(delta)], axis=0))
    root = xp.sqrt(S)
    up, down = U * root, root[:, None] * (Vh @ P.mT)
    return xp.astype(up, delta.dtype), xp.astype(down, delta.dtype), S


def _projected(delta: Array, left: Array) -> Array:
    """Return ``leftᵀ Δ`` in float64."""
    xp = array_namespace(delta)
    projected = xp.zeros((left.shape[1], delta.shape[1]), dtype=xp.float64, device=delta.device)
    for start, block in _blocks(delta):
        projected += left[start : start + block.shape[0], :].mT @ double(block)
    return projected


def _products(one: Array, other: Array) -> np.ndarray:
    """Return the inner products of all rows of the two in float64, on the processor."""
    first = double(one)
    second = first if one is other else double(other)
    return on_host(first @ second.mT)


def _from_basis(left: Array, projected: Array, values: Array) -> tuple[Array, Array, Array]:
    """Return ``U √S`` and ``√S Vᵀ`` from U and ``UᵀΔ = S Vᵀ``, in the dtype of the latter."""
    xp = array_namespace(projected)
    root = xp.sqrt(values)
    inverse = xp.where(root > 0, 1 / xp.clip(root, min=1e-300), 0.0)
    up = xp.astype(double(left) * root, projected.dtype)
    down = xp.astype(inverse[:, None] * double(projected), projected.dtype)
    return up, down, values


def _squared_residual(delta: Array, up: Array, down: Array, *, in_double: bool = False) -> float:
    """Return ``‖Δ - up @ down‖_F²``, by products in float64 where little is left of Δ."""
    if in_double:
        up, down = double(up), double(down)
    return math.fsum(
        _squares(block - up[start : start + block.shape[0], :] @ down)
        for start, block in _blocks(delta)
    )
