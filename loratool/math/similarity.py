"""How alike two low-rank matrices are, and what shape a spectrum has."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loratool.math.factored import Factored
from loratool.math.namespace import Array, array_namespace, squared_norm
from loratool.math.ranks import minimal_rank

__all__ = ["effective_rank", "energy_rank", "overlap", "stable_rank", "subspace_similarity"]


def overlap(first: Factored, second: Factored, count: int) -> tuple[Array, Array]:
    """Return φ(i, j) for i, j up to ``count``, of the left and of the right singular vectors.

    ``φ(i, j) = ‖U_iᵀ V_j‖_F² / min(i, j)`` (LoRA, arXiv 2106.09685, section 7.2): 1 where one
    of the subspaces of the leading i and j directions contains the other, 0 where they are
    orthogonal. Each result is ``(count, count)``, smaller where there are fewer directions.
    """
    sides = zip(first.directions(count), second.directions(count), strict=True)
    left, right = (_phi(one.mT @ other) for one, other in sides)
    return left, right


def subspace_similarity(first: Factored, second: Factored, ranks: tuple[int, int]) -> float:
    """Return φ of two whole subspaces, the mean of the left and the right side."""
    i, j = ranks
    if not i or not j:
        return 0.0
    left, right = (
        squared_norm(one[:, :i].mT @ other[:, :j]) / min(i, j)
        for one, other in zip(first.directions(i), second.directions(j), strict=True)
    )
    return (left + right) / 2


def _phi(product: Array) -> Array:
    xp = array_namespace(product)
    sums = xp.cumulative_sum(xp.cumulative_sum(product * product, axis=0), axis=1)
    rows, columns = (
        xp.arange(1, size + 1, dtype=product.dtype, device=product.device) for size in product.shape
    )
    return sums / xp.minimum(rows[:, None], columns[None, :])


def stable_rank(values: Sequence[float]) -> float:
    """Return ``‖Δ‖_F² / ‖Δ‖₂²`` from singular values; 0 for a zero matrix."""
    largest = max(values, default=0.0)
    return math.fsum((value / largest) ** 2 for value in values) if largest else 0.0


def effective_rank(values: Sequence[float]) -> float:
    """Return ``exp(H(σ / Σσ))``, the entropy rank of Roy & Vetterli (2007); 0 for zero."""
    total = math.fsum(values)
    if not total:
        return 0.0
    shares = [value / total for value in values if value > 0]
    return math.exp(-math.fsum(share * math.log(share) for share in shares))


def energy_rank(values: Sequence[float], share: float) -> int:
    """Return the fewest leading singular values that hold ``share`` of ``‖Δ‖_F²``."""
    if not any(values):
        return 0
    return minimal_rank([value * value for value in values], "energy", share)
