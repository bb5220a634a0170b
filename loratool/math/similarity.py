"""How alike two low-rank matrices are, and what shape a spectrum has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loratool.math.factored import Factored
from loratool.math.ranks import minimal_rank

__all__ = ["effective_rank", "energy_rank", "overlap", "stable_rank", "subspace_similarity"]


def overlap(first: Factored, second: Factored, count: int) -> tuple[Tensor, Tensor]:
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
        float((one[:, :i].mT @ other[:, :j]).square().sum()) / min(i, j)
        for one, other in zip(first.directions(i), second.directions(j), strict=True)
    )
    return (left + right) / 2


def _phi(product: Tensor) -> Tensor:
    sums = product.square().cumsum(dim=0).cumsum(dim=1)
    rows = torch.arange(1, product.shape[0] + 1, device=product.device).unsqueeze(1)
    columns = torch.arange(1, product.shape[1] + 1, device=product.device).unsqueeze(0)
    return sums / torch.minimum(rows, columns)


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
