"""The arithmetic of one module: products and distances of many deltas, φ of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np

from loratool.math.factored import Factored, factor, inner, inner_products, norm
from loratool.math.lowrank import LowRank
from loratool.math.namespace import beside, on_host
from loratool.math.randomness import generator_for
from loratool.math.ranks import numerical_rank
from loratool.math.similarity import (
    expected_overlap,
    expected_similarity,
    overlap,
    subspace_similarity,
)
from loratool.plan.factors import site_deltas
from loratool.plan.host import DOUBLE
from loratool.verbs.algebra.modules import Joint
from loratool.verbs.algebra.sums import values_of
from loratool.verbs.comparison.result import Baseline, Matrix, ModuleComparison

__all__ = [
    "NAN_HINT",
    "Deltas",
    "Directions",
    "Mover",
    "Products",
    "compare_modules",
    "continued",
    "cosine",
    "deltas_of",
    "like",
    "multiply",
    "rank",
]

NEAR: Final = 1e-4
"""Of ``‖Δ₁‖² + ‖Δ₂‖²``: squared distances below it are not left to a difference of products."""
USUAL: Final = 8
"""How many directions of the smaller of two ranks are tabulated if nobody says."""
MOST: Final = 64
"""How many of the larger, as in the paper's figure of ranks 8 and 64."""
NAN_HINT: Final = "loratool validate --deep names the tensors"
Mover = Callable[[Any], Any]
Deltas = Sequence[LowRank]
"""The delta of one module; of stacked experts, one for each."""


@dataclass(frozen=True, slots=True)
class Directions:
    """How many leading singular directions φ is tabulated for.

    Attributes:
        most: At most so many of each. If nobody says, 8 of each; of the larger of two unequal
            ranks, 64.
    """

    most: int | None = None

    def of(self, ranks: tuple[int, int]) -> tuple[int, int]:
        """Return how many rows and columns there are for deltas of these ranks."""
        if self.most is not None:
            return min(self.most, ranks[0]), min(self.most, ranks[1])
        first, second = (min(USUAL if r <= min(ranks) else MOST, r) for r in ranks)
        return first, second


@dataclass(frozen=True, slots=True)
class Products:
    """What one module adds to the products and distances of all adapters.

    Attributes:
        inner: ``⟨Δ_i, Δ_j⟩``; NaN for an adapter whose delta is not finite.
        squared_distances: ``‖Δ_i - Δ_j‖²``.
        problems: By the place of an adapter, why its delta cannot be compared.
    """

    inner: np.ndarray
    squared_distances: np.ndarray
    problems: Mapping[int, str]


def deltas_of(joint: Joint, places: Mapping[int, int], mover: Mover) -> dict[int, list[LowRank]]:
    """Read a module of all adapters that have it, each factor once.

    Args:
        joint: The module.
        places: Place of an adapter by its ``id``.
        mover: Brings an array to where it is computed with.
    """
    return {
        places[id(term.adapter)]: [
            LowRank(mover(delta.up), mover(delta.down), delta.scale * term.weight)
            for delta in site_deltas(term.site, term.adapter, DOUBLE)
        ]
        for term in joint.terms
    }


def multiply(by_adapter: Mapping[int, Deltas], count: int) -> Products:
    """Return the products and distances of each two of ``count`` adapters at one module.

    Distances come from products; those of near ones, where that would cancel, from cores.
    """
    order = list(by_adapter)
    inside = sum(
        (inner_products(one) for one in zip(*by_adapter.values(), strict=True)),
        np.zeros((len(order), len(order))),
    )
    problems: dict[int, str] = {}
    for row, place in enumerate(order):
        if not math.isfinite(inside[row, row]):
            problems[place] = "holds NaN or infinity"
            inside[row], inside[:, row] = np.nan, np.nan
    for row, column in zip(*np.nonzero(np.isinf(inside)), strict=True):
        problems.setdefault(order[max(row, column)], "has a product that is not finite")
    products = np.zeros((count, count))
    products[np.ix_(order, order)] = inside
    norms = products.diagonal()
    sums = norms[:, None] + norms
    squared = np.maximum(sums - 2 * products, 0.0)
    near = np.triu((squared < NEAR * sums) & (sums > 0), 1)
    decomposed = cache(lambda place: [factor(delta) for delta in by_adapter[place]])
    for i, j in np.argwhere(near).tolist():
        exact = math.fsum(
            one.squared_distance(other)
            for one, other in zip(decomposed(i), by_adapter[j], strict=True)
        )
        squared[i, j] = squared[j, i] = exact
    np.fill_diagonal(squared, 0.0)
    return Products(products, squared, problems)


def compare_modules(
    name: str,
    one: Deltas,
    other: Deltas,
    directions: Directions,
    seed: int | None = None,
) -> tuple[float, ModuleComparison]:
    """Compare two deltas of one module, and return their squared distance too.

    Args:
        name: Of the module.
        one: The first, for each expert.
        other: The second.
        directions: How many are tabulated.
        seed: Of the random matrices to compare the first with as well, if any.

    Raises:
        ValueError: A delta is not finite.
    """
    firsts, seconds = [factor(delta) for delta in one], [factor(delta) for delta in other]
    squared = math.fsum(
        first.squared_distance(delta) for first, delta in zip(firsts, other, strict=True)
    )
    norms = (_norm(one), _norm(other))
    found = _phi(firsts, seconds, directions)
    module = ModuleComparison(
        module=name,
        cosine=cosine(math.fsum(map(inner, one, other)), *norms),
        relative_distance=math.sqrt(squared) / norms[0] if norms[0] else None,
        subspace_similarity=found.whole,
        phi_left=found.left,
        phi_right=found.right,
        norms=norms,
        baseline=None if seed is None else _baseline(firsts, other, directions, name, seed),
    )
    return squared, module


def like(name: str, deltas: Deltas, seed: int) -> list[LowRank]:
    """Return random deltas with the shapes, ranks and norms of ``deltas``.

    Their factors are Gaussian, so that their subspaces have no direction before another.

    Args:
        name: Of the module: numbers depend on it and on ``seed`` alone.
        deltas: One for each expert.
        seed: Any number.
    """
    found = []
    for expert, delta in enumerate(deltas):
        chance = generator_for(seed, "compare", name, expert)
        rows, columns = delta.shape
        count = rank(factor(delta))
        up = beside(chance.standard_normal((rows, count)), delta.up)
        down = beside(chance.standard_normal((count, columns)), delta.down)
        size = norm(LowRank(up, down))
        found.append(LowRank(up, down, norm(delta) / size if size else 0.0))
    return found


def rank(delta: Factored) -> int:
    """Return how many of the singular values are more than rounding."""
    return numerical_rank([value * value for value in values_of(delta)])


def cosine(product: float, one: float, other: float) -> float | None:
    """Return a cosine from a product and two norms; ``None`` where one is zero."""
    if not one or not other:
        return None
    return max(-1.0, min(1.0, product / one / other))


def continued(
    progress: Callable[[int, int], None] | None, before: int, total: int
) -> Callable[[int, int], None] | None:
    """Return a callback for one of several stretches of work, ``before`` which so much is done."""
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


@dataclass(frozen=True, slots=True)
class _Phi:
    """φ of two deltas, the mean over experts: the grids of both sides, and the whole."""

    left: Matrix
    right: Matrix
    whole: float | None


def _phi(firsts: Sequence[Factored], seconds: Sequence[Factored], directions: Directions) -> _Phi:
    lefts, rights, wholes = [], [], []
    for first, second in zip(firsts, seconds, strict=True):
        ranks = (rank(first), rank(second))
        if all(ranks):
            left, right = overlap(first, second, directions.of(ranks))
            lefts.append(on_host(left).tolist())
            rights.append(on_host(right).tolist())
            wholes.append(subspace_similarity(first, second, ranks))
    whole = math.fsum(wholes) / len(wholes) if wholes else None
    return _Phi(_mean(lefts), _mean(rights), whole)


def _baseline(
    firsts: Sequence[Factored], other: Deltas, directions: Directions, name: str, seed: int
) -> Baseline | None:
    """Return what φ of the first deltas is by chance, or nothing where all are zero."""
    chance = [factor(delta) for delta in like(name, other, seed)]
    found = _phi(firsts, chance, directions)
    if found.whole is None:
        return None
    lefts, rights, wholes = [], [], []
    for first, second, delta in zip(firsts, chance, other, strict=True):
        ranks = (rank(first), rank(second))
        if all(ranks):
            counts = directions.of(ranks)
            lefts.append(expected_overlap(counts, delta.shape[0]))
            rights.append(expected_overlap(counts, delta.shape[1]))
            wholes += [expected_similarity(*ranks, size) for size in delta.shape]
    return Baseline(
        _mean(lefts),
        _mean(rights),
        math.fsum(wholes) / len(wholes),
        found.left,
        found.right,
        found.whole,
    )


def _norm(deltas: Deltas) -> float:
    return math.sqrt(max(0.0, math.fsum(inner(delta, delta) for delta in deltas)))


def _mean(matrices: Sequence[Sequence[Sequence[float]]]) -> Matrix:
    """Return the mean over experts, as far as all have it."""
    if not matrices:
        return ()
    rows, columns = min(map(len, matrices)), min(len(matrix[0]) for matrix in matrices)
    return tuple(
        tuple(math.fsum(m[i][j] for m in matrices) / len(matrices) for j in range(columns))
        for i in range(rows)
    )
