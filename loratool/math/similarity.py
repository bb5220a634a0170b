"""How alike two low-rank matrices are, and what shape a spectrum has."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loratool.math.factored import Factored
from loratool.math.namespace import Array, array_namespace, squared_norm
from loratool.math.ranks import minimal_rank

__all__ = [
    "effective_rank",
    "energy_rank",
    "expected_overlap",
    "expected_similarity",
    "overlap",
    "stable_rank",
    "subspace_similarity",
]


def overlap(first: Factored, second: Factored, counts: tuple[int, int]) -> tuple[Array, Array]:
    """Return φ(i, j) of the left and of the right singular vectors, i and j up to ``counts``.

    ``φ(i, j) = ‖U_iᵀ V_j‖_F² / min(i, j)`` (LoRA, arXiv 2106.09685, section 7.2): 1 where one
    of the subspaces of the leading i and j directions contains the other, 0 where they are
    orthogonal. The paper draws the right ones, those of A. Each result has a row for each
    direction of the first and a column for each of the second; fewer where there are fewer.
    """
    sides = zip(first.directions(counts[0]), second.directions(counts[1]), strict=True)
    left, right = (_phi(one.mT @ other) for one, other in sides)
    return left, right


def expected_similarity(i: int, j: int, size: int) -> float:
    """Return the mean of φ(i, j) of random subspaces of a space with ``size`` dimensions.

    Each of the i · j squared products of unit vectors has the mean ``1 / size``, whatever the
    other vectors of its subspace, so that it is ``max(i, j) / size``.
    """
    return max(i, j) / size


def expected_overlap(counts: tuple[int, int], size: int) -> list[list[float]]:
    """Return :func:`expected_similarity` for every i and j up to ``counts``."""
    return [
        [expected_similarity(i, j, size) for j in range(1, counts[1] + 1)]
        for i in range(1, counts[0] + 1)
    ]


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


def energy_rank(profile: Sequence[float], share: float) -> int:
    """Return the fewest ranks that hold ``share`` of ``‖Δ‖_F²``; 0 for a zero matrix.

    Args:
        profile: What each further rank adds: the squares of singular values, descending.
        share: Between 0 and 1.
    """
    return minimal_rank(profile, "energy", share) if any(profile) else 0
