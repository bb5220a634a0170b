"""Which rank is enough: rules for one matrix, and one budget for many.

A matrix is described by its profile, the descending squares of its singular values: what each
further rank adds to ``‖Δ‖_F²``. Fused experts share one rank, so their profile is the sum of the
profiles of all of them.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["RULES", "allocate", "minimal_rank", "numerical_rank", "profile_of"]

NEGLIGIBLE: Final = 1e-26
"""Of the largest square: below it a singular value is the rounding of float64."""
SLACK: Final = 1e-12
"""Relative; a threshold that is met to this much is met."""
MAX_NODES: Final = 200_000
RULES: Final = ("energy", "max_error", "sv_ratio", "sv_fro", "sv_cumulative")


def profile_of(spectra: Sequence[Sequence[float]]) -> list[float]:
    """Return the profile of matrices that share one rank."""
    padded = itertools.zip_longest(*spectra, fillvalue=0.0)
    return [math.fsum(value * value for value in values) for values in padded]


def numerical_rank(profile: Sequence[float]) -> int:
    """Return how many singular values are more than the rounding of float64."""
    floor = profile[0] * NEGLIGIBLE if profile else 0.0
    return sum(1 for square in profile if square > floor)


def minimal_rank(profile: Sequence[float], rule: str, value: float, *, rest: float = 0.0) -> int:
    """Return the smallest rank that satisfies ``rule``, at least 1.

    Args:
        profile: Squares of the singular values, descending.
        rule: One of ``RULES``: ``energy``, the share of ``‖Δ‖_F²`` to keep; ``max_error``, the
            relative Frobenius error to allow; and the three of kohya's ``resize_lora``, each
            without its off-by-one: ``sv_ratio``, keep ``σ > σ₁ / value``; ``sv_fro``, the share
            of ``‖Δ‖_F`` to keep; ``sv_cumulative``, the share of ``Σσ`` to keep.
        value: What the rule is about.
        rest: What the matrix has of ``‖Δ‖_F²`` beside the profile, lost at any rank.
    """
    rank = numerical_rank(profile)
    squares = profile[:rank]
    if not squares:
        return 1
    match rule:
        case "sv_ratio":
            least = squares[0] / value**2
            return max(1, sum(1 for square in squares if square > least * (1 + SLACK)))
        case "sv_cumulative":
            return _smallest([math.sqrt(square) for square in squares], 1 - value)
        case "sv_fro":
            return _smallest(squares, 1 - value**2, rest)
        case "energy":
            return _smallest(squares, 1 - value, rest)
        case "max_error":
            return _smallest(squares, value**2, rest)
        case _:
            raise ValueError(rule)


def _smallest(terms: Sequence[float], allowed: float, rest: float = 0.0) -> int:
    """Return the fewest leading terms whose remainder is at most the share ``allowed``."""
    limit = (math.fsum(terms) + rest) * allowed * (1 + SLACK) - rest
    # Summed from the smallest on, so that small remainders keep their digits.
    tails = list(itertools.accumulate(reversed(terms)))
    return max(1, len(terms) - bisect.bisect_right(tails, limit))


@dataclass(frozen=True)
class _Class:
    """All pieces that cost the same: their gains, best first, as sums of the first n."""

    cost: int
    sums: list[float]

    def gains(self) -> Iterator[float]:
        """What each further piece gains for a byte."""
        for before, after in itertools.pairwise(self.sums):
            yield (after - before) / self.cost

    def turn(self, price: float) -> int:
        """How many pieces are worth their price; gains fall, so those are the first."""
        low, high = 0, len(self.sums) - 1
        while low < high:
            middle = (low + high) // 2
            if self.sums[middle + 1] - self.sums[middle] > price * self.cost:
                low = middle + 1
            else:
                high = middle
        return low

    def surplus(self, price: float) -> float:
        """The most that any number of pieces gains over its price."""
        count = self.turn(price)
        return self.sums[count] - price * count * self.cost


def allocate(
    profiles: Sequence[Sequence[float]],
    costs: Sequence[int],
    budget: int,
    *,
    caps: Sequence[int],
    multiple: int = 1,
) -> list[int]:
    """Return the rank of each matrix that minimises the total squared error within a budget.

    Pieces of one cost are interchangeable and best taken in the order of what they gain; how
    many of each cost is a small knapsack, solved exactly by branch and bound from the solution
    of its Lagrangian relaxation (its best solution found so far, where ties make that endless).

    Args:
        profiles: What each further rank of a matrix gains, descending; may be weighed.
        costs: Bytes of one rank of each matrix.
        budget: Bytes in all.
        caps: The largest rank allowed for each matrix; a multiple of ``multiple``, or smaller.
        multiple: Ranks come in steps of so many.
    """
    pieces: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for index, profile in enumerate(profiles):
        useful = min(numerical_rank(profile), caps[index])
        for start in range(0, useful, multiple):
            if start + multiple > caps[index] and multiple > 1:
                break
            gain = math.fsum(profile[start : min(start + multiple, useful)])
            pieces[costs[index] * multiple].append((gain, index))
    for group in pieces.values():
        group.sort(key=lambda piece: (-piece[0], piece[1]))
    classes = [
        _Class(cost, [0.0, *itertools.accumulate(gain for gain, _ in group)])
        for cost, group in sorted(pieces.items(), reverse=True)
    ]
    ranks = [0] * len(profiles)
    for group_class, count in zip(classes, _counts(classes, budget), strict=True):
        for _, index in pieces[group_class.cost][:count]:
            ranks[index] += multiple
    return ranks


def _counts(classes: Sequence[_Class], budget: int) -> list[int]:
    """Return how many pieces of each class to take."""
    if budget <= 0 or not classes:
        return [0] * len(classes)
    best_counts, price = _greedy(classes, budget)
    best = math.fsum(c.sums[n] for c, n in zip(classes, best_counts, strict=True))
    surpluses = [group.surplus(price) for group in classes]
    rest = [math.fsum(surpluses[index + 1 :]) for index in range(len(classes))]
    nodes = 0

    def search(left: int, value: float, counts: list[int]) -> None:
        nonlocal best, best_counts, nodes
        nodes += 1
        index = len(counts)
        group = classes[index]
        most = min(len(group.sums) - 1, left // group.cost)
        if index == len(classes) - 1:
            if value + group.sums[most] > best:
                best, best_counts = value + group.sums[most], [*counts, most]
            return
        turn = min(most, group.turn(price))
        for steps in (range(turn, -1, -1), range(turn + 1, most + 1)):
            for count in steps:
                remaining = left - count * group.cost
                bound = value + group.sums[count] + rest[index] + price * remaining
                if bound <= best or nodes > MAX_NODES:
                    break  # farther from the turn it only gets worse
                search(remaining, value + group.sums[count], [*counts, count])

    search(budget, 0.0, [])
    return best_counts


def _greedy(classes: Sequence[_Class], budget: int) -> tuple[list[int], float]:
    """Return a first solution, and the gain of the first piece that did not fit, for a byte."""
    counts = [0] * len(classes)
    price: float | None = None
    order = sorted((-gain, index) for index, c in enumerate(classes) for gain in c.gains())
    full: set[int] = set()
    for loss, index in order:
        cost = classes[index].cost
        if index in full or cost > budget:
            full.add(index)
            price = -loss if price is None else price
        else:
            counts[index] += 1
            budget -= cost
    return counts, price or 0.0
