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

import torch
from torch import Tensor

from loratool.math.lowrank import LowRank

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
"""Elements of the blocks in which squares are summed in float64."""


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

    up: Tensor
    down: Tensor
    singular_values: Tensor
    squared_norm: float
    squared_residual: float
    is_exact: bool

    @property
    def factors(self) -> LowRank:
        """The factors as a delta of scale 1."""
        return LowRank(self.up, self.down)


def leading_part(
    delta: Tensor, rank: int, generator: torch.Generator, *, method: str = "auto"
) -> Leading:
    """Return the leading ``rank`` singular triples of ``delta``.

    Args:
        delta: ``(m, n)``, float32 or float64.
        rank: How many, at most the smaller side.
        generator: Of the processor; the randomised route draws from it.
        method: ``exact``, ``randomised``, or ``auto``: whichever is quicker.

    Raises:
        ValueError: The matrix is not finite.
    """
    peak = float(delta.abs().max()) if delta.numel() else 0.0
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
    if not is_exact and residual < NEARLY_ALL * total:
        up, down, values = _refined(delta, up)
        residual = _squared_residual(delta, up, down)
    if not is_exact and abs(total - float(values.square().sum()) - residual) > SUSPICIOUS * total:
        # Rounding has spoilt the basis: the two ways to tell the residual have to agree.
        up, down, values = _exact(delta, rank)
        residual, is_exact = _squared_residual(delta, up, down), True
    return Leading(up, down, values, total, residual, is_exact)


def squared_norm(matrix: Tensor) -> float:
    """Return ``‖Δ‖_F²``, summed in float64 block by block."""
    return math.fsum(float(block.double().square().sum()) for block in _blocks(matrix))


def spacing_squares(stored: Tensor) -> float:
    """Return the sum of the squared distances between the numbers beside each element.

    Args:
        stored: Values of a finetuned weight, in the dtype in which they were stored.
    """
    eps = torch.finfo(stored.dtype).eps
    tiny = torch.finfo(stored.dtype).smallest_normal
    _, exponents = torch.frexp(stored.double().abs().clamp(min=tiny))
    return float(torch.exp2(2.0 * (exponents.double() - 1)).sum()) * eps**2


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


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Yield rows, a few at a time."""
    rows = max(1, BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], rows):
        yield matrix[start : start + rows]


def _numbered(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield rows with the index of the first."""
    start = 0
    for block in _blocks(matrix):
        yield start, block
        start += len(block)


def _exact(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    m, n = delta.shape
    if min(m, n) <= SVD_SIDE:
        U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
        root = S[:rank].sqrt()
        return (U[:, :rank] * root).to(delta), (root[:, None] * Vh[:rank]).to(delta), S[:rank]
    if m > n:
        up, down, S = _exact(delta.mT, rank)
        return down.mT.contiguous(), up.mT.contiguous(), S
    gram = torch.zeros(m, m, dtype=torch.float64, device=delta.device)
    for block in _blocks(delta.mT):
        wide = block.double()
        gram.addmm_(wide.mT, wide)
    squares, U = torch.linalg.eigh(gram)
    squares, U = squares.flip(0)[:rank].clamp(min=0), U.flip(1)[:, :rank]
    return _from_basis(delta, U, U.mT.to(delta) @ delta, squares.sqrt())


def _krylov(
    delta: Tensor, rank: int, total: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    m, n = delta.shape
    width = min(rank + OVERSAMPLING, m, n)
    start = torch.randn(n, width, generator=generator, dtype=delta.dtype).to(delta.device)
    basis = _new_directions(delta @ start, None)
    newest = cores = basis.mT @ delta
    captured = 0.0
    for number in range(1, MOST_BLOCKS + 1):
        squares, vectors = torch.linalg.eigh(_gram(cores))
        energy = float(squares.clamp(min=0)[-rank:].sum())
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
        basis = torch.cat([basis, block], dim=1)
        cores = torch.cat([cores, newest], dim=0)
    squares, vectors = squares.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]
    turn = vectors.to(delta)
    up, down, values = _from_basis(delta, basis @ turn, turn.mT @ cores, squares.sqrt())
    missing_ranks = rank - values.shape[0]
    if missing_ranks > 0:
        pad = torch.nn.functional.pad
        up, down = pad(up, (0, missing_ranks)), pad(down, (0, 0, 0, missing_ranks))
        values = pad(values, (0, missing_ranks))
    return up, down, values


def _new_directions(block: Tensor, basis: Tensor | None) -> Tensor:
    """Return orthonormal columns for what ``block`` has beside ``basis``, dead ones left out.

    Columns that are nearly zero after the projection are only rounding; made orthonormal they
    would point anywhere, also back into the basis.
    """
    reach = float(block.double().square().sum(dim=0).max())
    for _ in range(2):  # once leaves a loss of orthogonality where blocks nearly repeat
        if basis is not None:
            block = block - basis @ (basis.mT @ block)
        squares, turn = torch.linalg.eigh(_gram(block.mT))
        alive = squares > DEAD**2 * reach
        scale = squares[alive].rsqrt()
        block = (block.double() @ (turn[:, alive] * scale)).to(block)
        reach = 1.0
    Q: Tensor = torch.linalg.qr(block).Q  # well conditioned now: orthonormal to all digits
    return Q


def _refined(delta: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the decomposition of Δ within the columns of ``up``, projected in float64."""
    Q = torch.linalg.qr(up.double()).Q
    projected = torch.zeros(Q.shape[1], delta.shape[1], dtype=Q.dtype, device=Q.device)
    for start, block in _numbered(delta):
        projected.addmm_(Q[start : start + len(block)].mT, block.double())
    U, S, Vh = torch.linalg.svd(projected, full_matrices=False)
    root = S.sqrt()
    return (Q @ (U * root)).to(delta), (root[:, None] * Vh).to(delta), S


def _gram(rows: Tensor) -> Tensor:
    wide = rows.double()
    return wide @ wide.mT


def _from_basis(
    delta: Tensor, left: Tensor, projected: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U √S`` and ``√S Vᵀ`` from U and ``UᵀΔ = S Vᵀ``."""
    root = values.sqrt()
    inverse = torch.where(root > 0, 1 / root.clamp(min=1e-300), 0.0)
    up = (left.double() * root).to(delta)
    down = (inverse[:, None] * projected.double()).to(delta)
    return up, down, values


def _squared_residual(delta: Tensor, up: Tensor, down: Tensor) -> float:
    return math.fsum(
        float((block - up[start : start + len(block)] @ down).double().square().sum())
        for start, block in _numbered(delta)
    )
