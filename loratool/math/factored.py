"""The singular value decomposition of ``scale · up @ down`` without ever forming the product.

``up = Q_B R_B`` and ``downᵀ = Q_A R_A``, so that ``Δ = Q_B (scale · R_B R_Aᵀ) Q_Aᵀ``: the small
core between the two orthonormal bases has all the singular values, and its singular vectors,
rotated by the bases, are those of Δ. For factors of rank r this takes ``O((m + n) r² + r³)``
instead of ``O(m n min(m, n))``. Everything is float64: the factors of adapters that nearly
cancel lose all their digits in float32.

The R come from a Cholesky decomposition of the Gram matrix where a factor is well conditioned,
which is two to three times as fast, and from Householder QR where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from loratool.math.lowrank import LowRank
from loratool.math.namespace import (
    Array,
    array_namespace,
    beside,
    double,
    on_host,
    padded,
    squared_norm,
)
from loratool.math.small import cholesky, svd, upper_inverse

__all__ = ["Basis", "Factored", "factor", "from_core", "inner", "inner_products", "norm"]

WELL_CONDITIONED: Final = 1e-3
"""Smallest over largest diagonal element of a Cholesky factor. What it costs in orthogonality is
the square of the condition number times the rounding of float64: 1e-10 at this limit."""


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns, ``(m, p)``, as ``columns @ turn``, or as they are.

    Attributes:
        columns: ``(m, r)``.
        turn: ``(r, p)``, or ``None`` for the identity.
    """

    columns: Array
    turn: Array | None = None

    def apply(self, matrix: Array) -> Array:
        """Return ``Q @ matrix``, ``(m, k)``."""
        return self.columns @ (matrix if self.turn is None else self.turn @ matrix)

    def project(self, matrix: Array) -> Array:
        """Return ``Qᵀ @ matrix``, ``(p, k)``."""
        inside = self.columns.mT @ matrix
        return inside if self.turn is None else self.turn.mT @ inside


@dataclass(frozen=True)
class Factored:
    """A matrix ``(m, n)`` as ``left @ core @ rightᵀ`` with orthonormal bases, float64.

    Attributes:
        left: ``(m, p)``.
        core: ``(p, q)``.
        right: ``(n, q)``.
    """

    left: Basis
    core: Array
    right: Basis

    @cached_property
    def _svd(self) -> tuple[Array, Array, Array]:
        return svd(self.core)

    @property
    def singular_values(self) -> Array:
        """``(min(p, q),)``, descending; all others of the matrix are zero."""
        return self._svd[1]

    @property
    def squared_norm(self) -> float:
        """``‖Δ‖_F²``."""
        return squared_norm(self.core)

    def dense(self) -> Array:
        """The matrix itself, ``(m, n)``."""
        return self.left.apply(self.right.apply(self.core.mT).mT)

    def directions(self, count: int) -> tuple[Array, Array]:
        """Return the leading left ``(m, count)`` and right ``(n, count)`` singular vectors."""
        U, _, Vh = self._svd
        return self.left.apply(U[:, :count]), self.right.apply(Vh[:count, :].mT)

    def truncated(self, rank: int) -> LowRank:
        """Return the best approximation of ``rank`` (Eckart & Young 1936), scale 1.

        The singular values are split evenly: ``up = U √S``, ``down = √S Vᵀ``. A rank beyond
        the number of singular values is filled with zeros.
        """
        U, S, Vh = self._svd
        count = min(rank, S.shape[0])
        root = array_namespace(S).sqrt(S[:count])
        up = self.left.apply(U[:, :count] * root)
        down = self.right.apply(Vh[:count, :].mT * root).mT
        return LowRank(padded(up, up.shape[0], rank), padded(down, rank, down.shape[1]))

    def squared_distance(self, other: LowRank) -> float:
        """Return ``‖Δ - other‖_F²`` exactly, however close the two are.

        What the other has outside the two bases is orthogonal to Δ; inside them the small cores
        are subtracted. Nothing large cancels, unlike in ``‖Δ‖² - 2⟨Δ, other⟩ + ‖other‖²``.
        """
        up, right = double(other.up) * other.scale, double(other.down).mT
        inside_up, inside_right = self.left.project(up), self.right.project(right)
        outside_up = up - self.left.apply(inside_up)
        outside_right = right - self.right.apply(inside_right)
        return (
            squared_norm(self.core - inside_up @ inside_right.mT)
            + _squared_norm(inside_up, outside_right.mT)
            + _squared_norm(outside_up, inside_right.mT)
            + _squared_norm(outside_up, outside_right.mT)
        )


@np.errstate(over="ignore", invalid="ignore")
def factor(delta: LowRank) -> Factored:
    """Decompose ``delta`` on its own device, in float64.

    Raises:
        ValueError: A factor or the scale is not finite.
    """
    xp = array_namespace(delta.up, delta.down)
    left, upper = _orthonormal(double(delta.up))
    right, lower = _orthonormal(double(delta.down).mT)
    core = (upper @ lower.mT) * delta.scale
    if not bool(xp.all(xp.isfinite(core))):
        raise ValueError("not finite")
    return Factored(left, core, right)


def from_core(left: Array, core: Array, right: Array) -> Factored:
    """Return ``left @ core @ rightᵀ`` for bases that are orthonormal already."""
    return Factored(Basis(left), core, Basis(right))


def _orthonormal(matrix: Array) -> tuple[Basis, Array]:
    """Return an orthonormal basis of the columns of a matrix, and R with ``matrix = Q R``.

    Args:
        matrix: ``(m, r)``, float64.
    """
    rows, columns = matrix.shape
    if 0 < 2 * columns <= rows and (upper := cholesky(matrix.mT @ matrix)) is not None:
        diagonal = np.diagonal(upper)
        if diagonal.min() > WELL_CONDITIONED * diagonal.max():
            return Basis(matrix, beside(upper_inverse(upper), matrix)), beside(upper, matrix)
    Q, R = array_namespace(matrix).linalg.qr(matrix)
    return Basis(Q), R


@np.errstate(over="ignore", invalid="ignore")
def inner(first: LowRank, second: LowRank) -> float:
    """Return ``⟨Δ₁, Δ₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ))`` in float64, from small Gram matrices.

    It is exact to the rounding of ``‖Δ₁‖ ‖Δ₂‖``.
    """
    left = double(first.up).mT @ double(second.up)
    right = double(first.down) @ double(second.down).mT
    return float(array_namespace(left, right).sum(left * right)) * first.scale * second.scale


@np.errstate(over="ignore", invalid="ignore")
def inner_products(deltas: Sequence[LowRank]) -> np.ndarray:
    """Return :func:`inner` of each two of ``deltas``, which all share a shape.

    Each is multiplied with all that follow it at once, so that what is in memory beside the
    factors is as large as one pair of them with the ranks of all.

    Returns:
        Float64, symmetric; a row and a column for each.
    """
    ups = [double(delta.up) for delta in deltas]
    downs = [double(delta.down) for delta in deltas]
    xp = array_namespace(*ups, *downs)
    across, along = xp.concat(ups, axis=1), xp.concat(downs, axis=0)
    starts = np.cumsum([0, *(delta.rank for delta in deltas[:-1])])
    scales = np.array([delta.scale for delta in deltas])
    found = np.zeros((len(deltas), len(deltas)))
    for i, (up, down) in enumerate(zip(ups, downs, strict=True)):
        rest = slice(int(starts[i]), None)
        product = (up.mT @ across[:, rest]) * (down @ along[rest, :].mT)
        found[i, i:] = np.add.reduceat(on_host(xp.sum(product, axis=0)), starts[i:] - starts[i])
    found *= scales[:, None] * scales
    return np.triu(found) + np.triu(found, 1).T


@np.errstate(over="ignore", invalid="ignore")
def norm(delta: LowRank) -> float:
    """Return ``‖Δ‖_F`` from Gram matrices."""
    return math.sqrt(_squared_norm(double(delta.up), double(delta.down))) * abs(delta.scale)


def _squared_norm(up: Array, down: Array) -> float:
    """Return ``‖up @ down‖_F²``, not negative whatever rounding makes of it."""
    product = (up.mT @ up) * (down @ down.mT)
    return max(0.0, float(array_namespace(product).sum(product)))
