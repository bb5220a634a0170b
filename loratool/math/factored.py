"""The singular value decomposition of ``scale · up @ down`` without ever forming the product.

``up = Q_B R_B`` and ``downᵀ = Q_A R_Aᵀ``, so that ``Δ = Q_B (scale · R_B R_A) Q_Aᵀ``: the small
core between the two orthonormal bases has all the singular values, and its singular vectors,
rotated by the bases, are those of Δ. For factors of rank r this takes ``O((m + n) r² + r³)``
instead of ``O(m n min(m, n))``. Everything is float64: the factors of adapters that nearly
cancel lose all their digits in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loratool.math.lowrank import LowRank

__all__ = ["Factored", "factor", "from_core", "inner", "norm"]


@dataclass(frozen=True)
class Factored:
    """A matrix ``(m, n)`` as ``left @ core @ rightᵀ`` with orthonormal bases, float64.

    Attributes:
        left: ``(m, p)``, orthonormal columns.
        core: ``(p, q)``.
        right: ``(n, q)``, orthonormal columns.
    """

    left: Tensor
    core: Tensor
    right: Tensor

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(self.core, full_matrices=False)
        return U, S, Vh

    @property
    def singular_values(self) -> Tensor:
        """``(min(p, q),)``, descending; all others of the matrix are zero."""
        return self._svd[1]

    @property
    def squared_norm(self) -> float:
        """``‖Δ‖_F²``."""
        return float(self.core.square().sum())

    def directions(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the leading left ``(m, count)`` and right ``(n, count)`` singular vectors."""
        U, _, Vh = self._svd
        return self.left @ U[:, :count], self.right @ Vh[:count].mT

    def truncated(self, rank: int) -> LowRank:
        """Return the best approximation of ``rank`` (Eckart & Young 1936), scale 1.

        The singular values are split evenly: ``up = U √S``, ``down = √S Vᵀ``. A rank beyond
        the number of singular values is filled with zeros.
        """
        U, S, Vh = self._svd
        count = min(rank, S.shape[0])
        root = S[:count].sqrt()
        up = self.left @ (U[:, :count] * root)
        down = (root.unsqueeze(1) * Vh[:count]) @ self.right.mT
        if count < rank:
            up = torch.nn.functional.pad(up, (0, rank - count))
            down = torch.nn.functional.pad(down, (0, 0, 0, rank - count))
        return LowRank(up, down)

    def squared_distance(self, other: LowRank) -> float:
        """Return ``‖Δ - other‖_F²`` exactly, however close the two are.

        What the other has outside the two bases is orthogonal to Δ; inside them the small cores
        are subtracted. Nothing large cancels, unlike in ``‖Δ‖² - 2⟨Δ, other⟩ + ‖other‖²``.
        """
        up, down = other.up.double() * other.scale, other.down.double()
        inside_up, inside_down = self.left.mT @ up, down @ self.right
        outside_up, outside_down = up - self.left @ inside_up, down - inside_down @ self.right.mT
        parts = (
            (self.core - inside_up @ inside_down).square().sum(),
            _squared_norm(inside_up, outside_down),
            _squared_norm(outside_up, inside_down),
            _squared_norm(outside_up, outside_down),
        )
        return sum(max(0.0, float(part)) for part in parts)


def factor(delta: LowRank) -> Factored:
    """Decompose ``delta`` on its own device, in float64.

    Raises:
        ValueError: A factor or the scale is not finite.
    """
    left, upper = torch.linalg.qr(delta.up.double())
    right, lower = torch.linalg.qr(delta.down.double().mT)
    core = (upper @ lower.mT).mul_(delta.scale)
    if not bool(core.isfinite().all()):
        raise ValueError("not finite")
    return Factored(left, core, right)


def from_core(left: Tensor, core: Tensor, right: Tensor) -> Factored:
    """Return ``left @ core @ rightᵀ`` for bases that are orthonormal already."""
    return Factored(left, core, right)


def inner(first: LowRank, second: LowRank) -> float:
    """Return ``⟨Δ₁, Δ₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ))`` in float64, from small Gram matrices.

    It is exact to the rounding of ``‖Δ₁‖ ‖Δ₂‖``.
    """
    left = first.up.double().mT @ second.up.double()
    right = first.down.double() @ second.down.double().mT
    return float((left * right).sum()) * first.scale * second.scale


def norm(delta: LowRank) -> float:
    """Return ``‖Δ‖_F`` from Gram matrices."""
    squared = _squared_norm(delta.up.double(), delta.down.double())
    return math.sqrt(max(0.0, float(squared))) * abs(delta.scale)


def _squared_norm(up: Tensor, down: Tensor) -> Tensor:
    return ((up.mT @ up) * (down @ down.mT)).sum()
