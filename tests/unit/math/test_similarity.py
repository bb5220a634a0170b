"""φ against dense float64 and its laws; clusters against the definition of average linkage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.math.clustering import average_linkage, leaf_order
from loratool.math.factored import factor
from loratool.math.lowrank import LowRank
from loratool.math.similarity import expected_overlap, expected_similarity, overlap

SEEDS = st.integers(0, 2**31)
RANKS = st.integers(1, 6)


def a_delta(rank: int, seed: int, rows: int = 17, columns: int = 13) -> LowRank:
    chance = np.random.default_rng(seed)
    return LowRank(
        chance.standard_normal((rows, rank)), chance.standard_normal((rank, columns)), 0.7
    )


def phi(one: LowRank, other: LowRank, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
    left, right = overlap(factor(one), factor(other), (i, j))
    return np.asarray(left), np.asarray(right)


def test_ranks_8_and_64_give_the_grid_of_the_paper() -> None:
    one, other = a_delta(8, 1, 96, 80), a_delta(64, 2, 96, 80)
    found = phi(one, other, 8, 64)
    U, _, Vh = np.linalg.svd(one.scale * one.up @ one.down)
    P, _, Qh = np.linalg.svd(other.scale * other.up @ other.down)
    for grid, first, second in zip(found, (U, Vh.T), (P, Qh.T), strict=True):
        assert grid.shape == (8, 64)
        for i, j in itertools.product(range(1, 9), range(1, 65)):
            norm = np.linalg.norm(first[:, :i].T @ second[:, :j]) ** 2
            assert grid[i - 1, j - 1] == pytest.approx(norm / min(i, j), rel=1e-9)


@given(RANKS, RANKS, SEEDS)
@settings(max_examples=40, deadline=None)
def test_phi_is_a_share_and_is_symmetric(r: int, s: int, seed: int) -> None:
    one, other = a_delta(r, seed), a_delta(s, seed + 1)
    there, back = phi(one, other, r, s), phi(other, one, s, r)
    for grid, turned in zip(there, back, strict=True):
        assert grid.shape == (r, s)
        assert (grid > -1e-12).all() and (grid < 1 + 1e-9).all()
        np.testing.assert_allclose(grid, turned.T, atol=1e-9)
        # A larger subspace holds at least as much of the smaller one.
        for i, j in itertools.product(range(r), range(s)):
            if j + 1 < s and j >= i:
                assert grid[i, j + 1] >= grid[i, j] - 1e-9
            if i + 1 < r and i >= j:
                assert grid[i + 1, j] >= grid[i, j] - 1e-9


@given(RANKS, RANKS, SEEDS)
@settings(max_examples=40, deadline=None)
def test_phi_is_of_the_delta_however_it_is_factored(r: int, s: int, seed: int) -> None:
    one, other = a_delta(r, seed), a_delta(s, seed + 1)
    # A matrix of GL(r) between the factors that is well conditioned.
    turn = np.eye(r) + 0.4 * np.random.default_rng(seed).standard_normal((r, r)) / r
    again = LowRank(one.up @ turn, np.linalg.solve(turn, one.down), one.scale)
    for grid, same in zip(phi(one, other, r, s), phi(again, other, r, s), strict=True):
        np.testing.assert_allclose(grid, same, atol=1e-6)


@given(RANKS, SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_subspace_is_in_itself_and_not_in_what_is_orthogonal(r: int, seed: int) -> None:
    one = a_delta(r, seed)
    for grid in phi(one, one, r, r):
        np.testing.assert_allclose(grid, 1, atol=1e-9)
    U, _, Vh = np.linalg.svd(one.up @ one.down)
    beside = LowRank(U[:, r : 2 * r], Vh[r : 2 * r])
    for grid in phi(one, beside, r, r):
        np.testing.assert_allclose(grid, 0, atol=1e-9)


def test_random_subspaces_have_the_mean_that_is_expected() -> None:
    counts, size, tries = (3, 5), 20, 3000
    chance = np.random.default_rng(0)
    total = np.zeros(counts)
    for _ in range(tries):
        one, other = (np.linalg.qr(chance.standard_normal((size, n)))[0] for n in counts)
        for i, j in itertools.product(range(1, 4), range(1, 6)):
            norm = np.linalg.norm(one[:, :i].T @ other[:, :j]) ** 2
            total[i - 1, j - 1] += norm / min(i, j)
    np.testing.assert_allclose(total / tries, expected_overlap(counts, size), rtol=0.05)
    assert expected_similarity(8, 64, 64) == 1


# ------------------------------------------------------------------- clusters


def truth(distances: np.ndarray) -> list[tuple[frozenset[int], float]]:
    """Return what average linkage makes: means over all pairs, by definition."""
    clusters = [frozenset([place]) for place in range(len(distances))]
    found = []
    while len(clusters) > 1:
        pairs = itertools.combinations(clusters, 2)
        one, other = min(pairs, key=lambda pair: distances[np.ix_([*pair[0]], [*pair[1]])].mean())
        clusters = [c for c in clusters if c not in (one, other)] + [one | other]
        found.append((one | other, float(distances[np.ix_([*one], [*other])].mean())))
    return found


def a_table(count: int, seed: int) -> np.ndarray:
    table = np.random.default_rng(seed).random((count, count))
    return (table + table.T) / 2


@given(st.integers(1, 9), SEEDS)
@settings(max_examples=40, deadline=None)
def test_clusters_are_those_of_mean_distances(count: int, seed: int) -> None:
    table = a_table(count, seed)
    joinings = average_linkage(table.tolist())
    members = {place: frozenset([place]) for place in range(count)}
    for step, (joining, (expected, distance)) in enumerate(
        zip(joinings, truth(table), strict=True)
    ):
        members[count + step] = members[joining.first] | members[joining.second]
        assert members[count + step] == expected
        assert joining.distance == pytest.approx(distance)
        assert joining.size == len(expected)
    order = leaf_order(joinings, table.tolist())
    assert sorted(order) == list(range(count))
    for cluster in members.values():
        places = sorted(order.index(member) for member in cluster)
        assert places == list(range(places[0], places[0] + len(cluster)))


def test_equal_distances_are_joined_in_order() -> None:
    joinings = average_linkage([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    assert [(j.first, j.second) for j in joinings] == [(0, 1), (2, 3)]
