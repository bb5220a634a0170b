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
    total = squared_norm(delta)
    if not math.isfinite(total):
        raise ValueError("not finite")
    rank = min(rank, *delta.shape)
    wide = OVERSAMPLING + rank
    is_small = min(delta.shape) <= max(SMALL_SIDE, 4 * wide)
    if method == "exact" or (method == "auto" and is_small) or wide >= min(delta.shape):
        up, down, values = _exact(delta, rank)
        is_exact = True
    else:
        up, down, values = _krylov(delta, rank, total, generator)
        is_exact = False
    residual = _squared_residual(delta, up, down)
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
    _, exponents = torch.frexp(stored.float().abs().clamp(min=tiny))
    return float(torch.exp2(2.0 * (exponents.float() - 1)).sum(dtype=torch.float64)) * eps**2


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
    basis = torch.linalg.qr(delta @ start).Q
    cores = basis.mT @ delta
    newest = cores
    captured = 0.0
    for number in range(1, MOST_BLOCKS):
        squares, vectors = torch.linalg.eigh(_gram(cores))
        energy = float(squares.clamp(min=0)[-rank:].sum())
        missing = total - energy
        is_stalled = energy - captured <= GROWTH * missing
        if number >= LEAST_BLOCKS and (is_stalled or missing <= NEGLIGIBLE * total):
            break
        if basis.shape[1] + width > min(m, n):
            return _exact(delta, rank)
        captured = energy
        block = delta @ newest.mT
        for _ in range(2):  # once leaves a loss of orthogonality where blocks nearly repeat
            block = block - basis @ (basis.mT @ block)
            block = torch.linalg.qr(block).Q
        newest = block.mT @ delta
        basis = torch.cat([basis, block], dim=1)
        cores = torch.cat([cores, newest], dim=0)
    else:
        squares, vectors = torch.linalg.eigh(_gram(cores))
    squares, vectors = squares.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]
    turn = vectors.to(delta)
    return _from_basis(delta, basis @ turn, turn.mT @ cores, squares.sqrt())


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
