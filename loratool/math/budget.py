"""One budget of bytes for the ranks of many matrices.

A rank has a gain, the square of its singular value, and a price, its bytes; a matrix that gets
any rank at all also has a fixed price, its entries in the header of the file.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from loratool.math.ranks import numerical_rank

__all__ = ["Item", "allocate", "spend"]

MAX_NODES: Final = 4_000
"""Where a search ends that ties or many prices make endless; by then it gains next to nothing."""
FEW: Final = 10
"""With so few matrices every choice of those that get ranks is tried."""
DROPS: Final = 24
"""With more, about so many numbers of the least valuable ones to leave out are tried."""
TRIES: Final = 4
"""How often to make room for a header that grows with the ranks."""


@dataclass(frozen=True)
class Item:
    """A matrix that may get ranks.

    Attributes:
        gains: What each further rank gains, descending.
        cost: Bytes of one rank.
        cap: The most ranks that it may get.
        is_forced: Whether it has to get one step of ranks at least.
    """

    gains: Sequence[float]
    cost: int
    cap: int
    is_forced: bool = False

    def value(self, rank: int) -> float:
        """What ``rank`` ranks gain together."""
        return math.fsum(self.gains[:rank])


def spend(
    items: Sequence[Item],
    budget: int,
    *,
    size_of: Callable[[Sequence[int]], int],
    multiple: int = 1,
) -> list[int]:
    """Return the rank of each item, for the largest total gain that fits.

    For a given choice of the items that get ranks at all, :func:`allocate` is exact. With few
    items every choice is tried; with many, leaving out the least valuable ones, in turn.

    Args:
        items: The matrices.
        budget: Bytes of the whole file.
        size_of: Returns the size of the file for given ranks, header and all.
        multiple: Ranks come in steps of so many.

    Returns:
        Ranks; all zero where nothing fits.
    """
    best: tuple[float, list[int]] = (0.0, [0] * len(items))
    for chosen in _choices(items, multiple):
        ranks = _fill(items, chosen, budget, size_of, multiple)
        if ranks is None:
            continue
        value = math.fsum(item.value(rank) for item, rank in zip(items, ranks, strict=True))
        if value > best[0] or (value == best[0] and not any(best[1])):
            best = (value, ranks)
    return best[1]


def _choices(items: Sequence[Item], multiple: int) -> Iterator[tuple[int, ...]]:
    """Yield sets of items that may get ranks; the forced ones are in all."""
    forced = [index for index, item in enumerate(items) if item.is_forced]
    free = [index for index, item in enumerate(items) if not item.is_forced]
    if len(free) <= FEW:
        for count in range(len(free), -1, -1):
            for chosen in itertools.combinations(free, count):
                yield tuple(sorted((*forced, *chosen)))
        return
    free.sort(key=lambda i: items[i].value(multiple) / max(1, items[i].cost), reverse=True)
    yield tuple(range(len(items)))
    count = len(free) - 1
    while count > 0:
        yield tuple(sorted((*forced, *free[:count])))
        count -= max(1, len(free) // DROPS)


def _fill(
    items: Sequence[Item],
    chosen: Sequence[int],
    budget: int,
    size_of: Callable[[Sequence[int]], int],
    multiple: int,
) -> list[int] | None:
    """Return the best ranks of the chosen items, or ``None`` where they do not all fit."""
    least = [0] * len(items)
    for index in chosen:
        least[index] = multiple
    left = budget - size_of(least)
    rest = [items[index] for index in chosen]
    knapsack = _Knapsack.of(
        [item.gains[multiple:] for item in rest],
        [item.cost for item in rest],
        [item.cap - multiple for item in rest],
        multiple,
    )
    for _ in range(TRIES):
        if left < 0:
            return None
        more = knapsack.filled(left)
        ranks = list(least)
        for index, extra in zip(chosen, more, strict=True):
            ranks[index] += extra
        # Larger ranks take more digits in the header.
        excess = size_of(ranks) - budget
        if excess <= 0:
            return ranks
        used = sum(item.cost * extra for item, extra in zip(rest, more, strict=True))
        left = used - excess
    while size_of(ranks) > budget:  # give up the least valuable step
        steps = [index for index in chosen if ranks[index] > multiple]
        if not steps:
            return None
        worst = min(
            steps,
            key=lambda i: items[i].value(ranks[i]) - items[i].value(ranks[i] - multiple),
        )
        ranks[worst] -= multiple
    return ranks


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
    return _Knapsack.of(profiles, costs, caps, multiple).filled(budget)


@dataclass(frozen=True)
class _Knapsack:
    """Everything that a budget may buy.

    Attributes:
        classes: The pieces of each price.
        owners: The matrix of each piece, for each class.
        multiple: How many ranks a piece is.
        count: The number of matrices.
    """

    classes: list[_Class]
    owners: list[list[int]]
    multiple: int
    count: int

    @classmethod
    def of(
        cls,
        profiles: Sequence[Sequence[float]],
        costs: Sequence[int],
        caps: Sequence[int],
        multiple: int,
    ) -> _Knapsack:
        """Sort the ranks of matrices by price and gain; see :func:`allocate`."""
        pieces: dict[int, list[tuple[float, int]]] = defaultdict(list)
        for index, (profile, cap) in enumerate(zip(profiles, caps, strict=True)):
            useful = min(numerical_rank(profile), cap)
            group = pieces[costs[index] * multiple]
            for start in range(0, useful, multiple):
                if start + multiple > cap and multiple > 1:
                    break
                gain = math.fsum(profile[start : min(start + multiple, useful)])
                group.append((-gain, index))
        classes, owners = [], []
        for cost, group in sorted(pieces.items(), reverse=True):
            group.sort()
            sums = [0.0, *itertools.accumulate(-loss for loss, _ in group)]
            classes.append(_Class(cost, sums))
            owners.append([index for _, index in group])
        return cls(classes, owners, multiple, len(profiles))

    @cached_property
    def order(self) -> list[tuple[float, int]]:
        """What each piece loses for a byte if it is left out, negative, and its class."""
        return sorted((-gain, i) for i, group in enumerate(self.classes) for gain in group.gains())

    def filled(self, budget: int) -> list[int]:
        """Return the ranks to buy, for each matrix."""
        ranks = [0] * self.count
        for owners, count in zip(self.owners, _counts(self, budget), strict=True):
            for index in owners[:count]:
                ranks[index] += self.multiple
        return ranks


def _counts(knapsack: _Knapsack, budget: int) -> list[int]:
    """Return how many pieces of each class to take."""
    classes = knapsack.classes
    if budget <= 0 or not classes:
        return [0] * len(classes)
    best_counts, price = _greedy(knapsack, budget)
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


def _greedy(knapsack: _Knapsack, budget: int) -> tuple[list[int], float]:
    """Return a first solution, and the gain of the first piece that did not fit, for a byte."""
    counts = [0] * len(knapsack.classes)
    price: float | None = None
    full: set[int] = set()
    for loss, index in knapsack.order:
        if len(full) == len(counts):
            break
        cost = knapsack.classes[index].cost
        if index in full or cost > budget:
            full.add(index)
            price = -loss if price is None else price
        else:
            counts[index] += 1
            budget -= cost
    return counts, price or 0.0
