"""Which of several things are alike: average linkage, and an order with the like side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Joining", "average_linkage", "leaf_order"]


@dataclass(frozen=True, slots=True)
class Joining:
    """Two clusters that become one.

    Attributes:
        first: Number of a cluster: a thing where it is less than how many there are, else
            what the joining of that number, counted on from there, has made.
        second: That of the other, which is larger.
        distance: The mean distance between things of the two.
        size: How many things are in the new cluster.
    """

    first: int
    second: int
    distance: float
    size: int


def average_linkage(distances: Sequence[Sequence[float]]) -> tuple[Joining, ...]:
    """Return which clusters join, the nearest first (UPGMA, Sokal & Michener 1958).

    Of several pairs that are equally near, the one with the smallest numbers goes first.

    Args:
        distances: ``(n, n)``, symmetric; what is on the diagonal does not matter.
    """
    table = np.array(distances, dtype=np.float64)
    count = len(table)
    np.fill_diagonal(table, np.inf)
    number = list(range(count))  # which cluster a row stands for
    sizes = np.ones(count)
    found: list[Joining] = []
    for step in range(count - 1):
        row, column = sorted(divmod(int(table.argmin()), count))
        first, second = sorted((number[row], number[column]))
        total = sizes[row] + sizes[column]
        found.append(Joining(first, second, float(table[row, column]), int(total)))
        # A row that is gone is infinitely far from all others, and stays so.
        merged = (sizes[row] * table[row] + sizes[column] * table[column]) / total
        table[row] = table[:, row] = merged
        table[row, row] = np.inf
        table[column] = table[:, column] = np.inf
        sizes[row], number[row] = total, count + step
    return tuple(found)


def leaf_order(
    joinings: Sequence[Joining], distances: Sequence[Sequence[float]]
) -> tuple[int, ...]:
    """Return the things in an order in which every cluster is one stretch.

    Of the ways to lay two clusters side by side, the one whose meeting ends are nearest.
    """
    count = len(joinings) + 1
    lines: dict[int, list[int]] = {place: [place] for place in range(count)}
    for step, joining in enumerate(joinings):
        one, other = lines.pop(joining.first), lines.pop(joining.second)
        ways = [(a, b) for a in (one, one[::-1]) for b in (other, other[::-1])]
        nearest = min(ways, key=lambda way: distances[way[0][-1]][way[1][0]])
        lines[count + step] = nearest[0] + nearest[1]
    (line,) = lines.values()
    return tuple(line)
