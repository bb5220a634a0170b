"""Low-rank algebra against dense float64: decompositions, rank rules, budgets, combinations."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import Library, on_libraries

from loratool.math import combining
from loratool.math.budget import Item, allocate, spend
from loratool.math.combining import Settings, combine, peft_linear
from loratool.math.factored import Factored, factor, inner, norm
from loratool.math.lowrank import LowRank
from loratool.math.ranks import minimal_rank, numerical_rank, profile_of
from loratool.math.similarity import (
    effective_rank,
    energy_rank,
    overlap,
    stable_rank,
    subspace_similarity,
)

SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**31)


def random_delta(m: int, n: int, r: int, seed: int, scale: float = 0.7) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator), scale
    )


def dense(delta: LowRank) -> torch.Tensor:
    return delta.scale * (delta.up.double() @ delta.down.double())


def singular_values(delta: LowRank) -> torch.Tensor:
    return factor(delta).singular_values


def truncated(delta: LowRank, rank: int) -> LowRank:
    return factor(delta).truncated(rank)


def squared_distance(delta: LowRank, other: LowRank) -> float:
    return factor(delta).squared_distance(other)


def combined(
    library: Library,
    method: str,
    deltas: list[LowRank],
    weights: list[float],
    options: Settings,
    seed: int | np.random.Generator = 0,
) -> Factored:
    """A method's result in tensors; its generator is the same whatever the library."""
    generator = np.random.default_rng(seed) if isinstance(seed, int) else seed
    found: Factored = library(
        lambda *parts: combine(method, parts, weights, options, generator), *deltas
    )
    return found


@on_libraries
@given(m=SIZES, n=SIZES, r=SIZES, seed=SEEDS)
@settings(deadline=None)
def test_factored_singular_values_are_those_of_the_dense_matrix(
    library: Library, m: int, n: int, r: int, seed: int
) -> None:
    delta = random_delta(m, n, r, seed)
    found = library(singular_values, delta)
    expected = torch.linalg.svdvals(dense(delta))[: min(m, n, r)]
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12 * expected[0])
    squared = library(lambda one: factor(one).squared_norm, delta)
    assert math.isclose(squared, float(dense(delta).square().sum()), rel_tol=1e-12)


@on_libraries
@given(m=SIZES, n=SIZES, r=SIZES, k=SIZES, seed=SEEDS)
@settings(deadline=None)
def test_truncation_is_the_best_and_its_factors_share_the_singular_values(
    library: Library, m: int, n: int, r: int, k: int, seed: int
) -> None:
    delta = random_delta(m, n, r, seed)
    found = library(singular_values, delta)
    cut = library(truncated, delta, k)
    truth = dense(delta)
    tail = float(torch.linalg.svdvals(truth)[k:].square().sum())
    lost = float((truth - dense(cut)).square().sum())
    assert lost <= tail * (1 + 1e-9) + 1e-24 * float(truth.square().sum())
    values = torch.nn.functional.pad(found[:k], (0, max(0, k - min(m, n, r))))
    assert torch.allclose(cut.up.mT @ cut.up, torch.diag(values), atol=1e-9 * values[0])
    assert torch.allclose(cut.down @ cut.down.mT, torch.diag(values), atol=1e-9 * values[0])


@on_libraries
def test_distance_keeps_its_digits_where_the_two_are_nearly_equal(library: Library) -> None:
    delta = random_delta(40, 30, 5, 1)
    for size in (1e-2, 1e-5, 1e-8):
        other = LowRank(delta.up.double() + size, delta.down.double(), delta.scale)
        found = library(squared_distance, delta, other)
        expected = float((dense(delta) - dense(other)).square().sum())
        assert math.isclose(found, expected, rel_tol=1e-5)


@on_libraries
def test_inner_products_and_norms_need_no_dense_matrix(library: Library) -> None:
    one, other = random_delta(9, 7, 3, 1, -1.5), random_delta(9, 7, 4, 2, 0.3)
    assert math.isclose(
        library(inner, one, other), float((dense(one) * dense(other)).sum()), rel_tol=1e-9
    )
    assert math.isclose(library(norm, one), float(dense(one).norm()), rel_tol=1e-12)


@pytest.mark.parametrize("shape", [(3, 2), (9, 2)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@on_libraries
def test_factoring_what_is_not_finite_is_an_error(
    library: Library, value: float, shape: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="finite"):
        library(singular_values, LowRank(torch.full(shape, value), torch.ones(2, 9)))


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9])
@on_libraries
def test_ill_conditioned_factors_lose_no_digits(library: Library, size: float) -> None:
    """Gram matrices alone would lose half of them; singular values are relative to the first."""
    up = torch.randn(40, 3).double()
    up[:, 2] = up[:, 0] + size * up[:, 1]
    delta = LowRank(up, torch.randn(3, 50).double())
    expected = torch.linalg.svdvals(dense(delta))[:3]
    found = library(singular_values, delta)
    assert float((found - expected).abs().max()) < 1e-14 * float(expected[0])


S = [10.0, 5.0, 2.0, 1.0, 0.5, 0.1]
PROFILE = [value**2 for value in S]


@pytest.mark.parametrize(
    ("rule", "value", "rank"),
    [
        ("sv_ratio", 4, 2),  # two are above 10 / 4
        ("sv_ratio", 5, 2),  # 2 is not above 10 / 5
        ("sv_ratio", 5.1, 3),
        ("sv_cumulative", 0.9, 3),
        ("sv_fro", 0.99, 3),
        ("energy", 100 / 130.26, 1),
        ("energy", 100 / 130.26 + 1e-6, 2),
        ("energy", 1.0, 6),
        ("max_error", 0.0, 6),
        ("max_error", 0.999, 1),
        ("max_error", math.sqrt(1.26 / 130.26), 3),
    ],
)
def test_rank_rules_give_the_smallest_rank(rule: str, value: float, rank: int) -> None:
    assert minimal_rank(PROFILE, rule, value) == rank


@given(
    values=st.lists(st.floats(1e-3, 10), min_size=1, max_size=12),
    share=st.floats(0.01, 0.999),
)
def test_energy_and_error_rules_are_minimal(values: list[float], share: float) -> None:
    profile = sorted((value**2 for value in values), reverse=True)
    total = sum(profile)
    rank = minimal_rank(profile, "energy", share)
    assert sum(profile[:rank]) >= share * total * (1 - 1e-9)
    assert rank == 1 or sum(profile[: rank - 1]) < share * total
    error = minimal_rank(profile, "max_error", share)
    assert math.sqrt(sum(profile[error:]) / total) <= share * (1 + 1e-9)
    assert error == 1 or math.sqrt(sum(profile[error - 1 :]) / total) > share


def test_rounding_noise_is_no_rank() -> None:
    assert numerical_rank([4.0, 1.0, 1e-31]) == 2
    assert numerical_rank([0.0, 0.0]) == 0
    assert minimal_rank([4.0, 1.0, 1e-31], "energy", 1.0) == 2
    assert minimal_rank([0.0, 0.0], "energy", 0.9) == 1
    assert profile_of([[2.0, 1.0], [3.0]]) == [13.0, 1.0]


def test_a_budget_is_spent_as_well_as_by_trying_everything() -> None:
    chance = random.Random(1)
    for _ in range(300):
        count, multiple = chance.randint(1, 4), chance.choice([1, 1, 2])
        profiles = [
            sorted((chance.random() ** 3 for _ in range(chance.randint(1, 4))), reverse=True)
            for _ in range(count)
        ]
        costs = [chance.choice([3, 5, 7, 8]) for _ in range(count)]
        caps = [len(profile) // multiple * multiple for profile in profiles]
        budget = chance.randint(0, 60)
        found = allocate(profiles, costs, budget, caps=caps, multiple=multiple)

        def value(ranks: tuple[int, ...] | list[int], of: list[list[float]] = profiles) -> float:
            return sum(sum(p[:k]) for p, k in zip(of, ranks, strict=True))

        assert sum(c * k for c, k in zip(costs, found, strict=True)) <= budget
        best = max(
            value(ranks)
            for ranks in itertools.product(*(range(0, cap + 1, multiple) for cap in caps))
            if sum(c * k for c, k in zip(costs, ranks, strict=True)) <= budget
        )
        assert value(found) >= best - 1e-12


# ------------------------------------------------------------------ combining


def three() -> list[LowRank]:
    return [random_delta(10, 8, r, seed, s) for r, seed, s in ((2, 1, 0.5), (3, 2, 2), (1, 3, -1))]


def joint_bases(deltas: list[LowRank]) -> tuple[torch.Tensor, torch.Tensor]:
    U, S, _ = torch.linalg.svd(torch.cat([dense(d) for d in deltas], dim=1))
    _, T, Vh = torch.linalg.svd(torch.cat([dense(d) for d in deltas], dim=0))
    return U[:, : int((S > 1e-9).sum())], Vh[: int((T > 1e-9).sum())].mT


@pytest.mark.slow
@on_libraries
def test_ties_is_pefts_ties_on_the_cores(library: Library) -> None:
    from peft.utils import merge_utils

    deltas, weights = three(), [1.0, 0.5, -0.7]
    U, V = joint_bases(deltas)
    cores = [U.mT @ dense(delta) @ V for delta in deltas]
    expected = U @ merge_utils.ties(cores, torch.tensor(weights).double(), 0.4) @ V.mT
    found = combined(library, "ties", deltas, weights, Settings(0.4))
    assert torch.allclose(found.dense(), expected, atol=1e-10)


@pytest.mark.slow
@on_libraries
def test_knots_is_ties_on_the_right_factors_of_all_deltas_side_by_side(library: Library) -> None:
    from peft.utils import merge_utils

    deltas, weights = three(), [1.0, 0.5, -0.7]
    U, S, Vh = torch.linalg.svd(torch.cat([dense(d) for d in deltas], dim=1), full_matrices=False)
    count = int((S > 1e-9).sum())
    parts = list(Vh[:count].split(8, dim=1))
    merged = merge_utils.ties(parts, torch.tensor(weights).double(), 0.4)
    found = combined(library, "knots", deltas, weights, Settings(0.4))
    expected = U[:, :count] * S[:count] @ merged
    assert torch.allclose(found.dense(), expected, atol=1e-10)


@pytest.mark.parametrize("method", ["ties", "knots", "dare", "della"])
@on_libraries
def test_methods_do_not_depend_on_how_a_delta_is_factored(library: Library, method: str) -> None:
    deltas, weights = three(), [1.0, 0.5, -0.7]
    mixed = []
    for delta in deltas:
        turn = torch.randn(delta.rank, delta.rank).double()
        mixed.append(
            LowRank(
                delta.up.double() @ turn, torch.linalg.solve(turn, delta.down.double()), delta.scale
            )
        )
    results = []
    for made in (deltas, mixed):
        found = combined(library, method, made, weights, Settings(), 1)
        results.append(found.dense())
    if method in ("dare", "della"):
        # Which entries are dropped is drawn in the order of directions, which stays the same.
        assert torch.allclose(results[0].norm(), results[1].norm(), rtol=1e-6)
    assert torch.allclose(results[0], results[1], atol=1e-8)


@pytest.mark.slow
def test_dare_keeps_the_expectation() -> None:
    library = Library("numpy")  # the others draw the same numbers
    deltas = three()[:2]
    U, V = joint_bases(deltas)
    generator = np.random.default_rng(5)
    total = torch.zeros(10, 8).double()
    for _ in range(3000):
        found = combined(library, "dare", deltas, [1.0, -0.5], Settings(0.6), generator)
        total += found.dense()
    expected = dense(deltas[0]) - 0.5 * dense(deltas[1])
    assert float((total / 3000 - expected).norm() / expected.norm()) < 0.05
    assert U.shape[1] == V.shape[1] == 5


@on_libraries
def test_della_drops_small_elements_more_often_and_without_a_window_is_dare_ties(
    library: Library,
) -> None:
    row = torch.tensor([[[8.0, 4.0, 2.0, 1.0]]]).double().expand(1, 4000, 4)
    generator = np.random.default_rng(3)
    kept = library(combining._magnitude_dropped, row, Settings(0.5, 0.6), generator)
    rates = (kept[0] != 0).double().mean(dim=0)
    assert torch.allclose(rates, torch.tensor([0.8, 0.6, 0.4, 0.2]).double(), atol=0.03)
    assert torch.allclose(kept[0].mean(dim=0), row[0, 0], rtol=0.1)
    deltas = three()
    della, dare = (
        combined(library, method, deltas, [1.0] * 3, Settings(0.5, 0.0), 2)
        for method in ("della", "dare-ties")
    )
    # The same probability, but kept above it instead of below.
    assert della.core.shape == dare.core.shape


@on_libraries
def test_trimming_keeps_the_first_of_equal_elements(library: Library) -> None:
    parts = torch.tensor([[[1.0, -2.0, 1.0], [1.0, 3.0, -1.0]], [[0.0] * 3] * 2]).double()
    expected = torch.tensor([[[1.0, -2.0, 0.0], [0.0, 3.0, 0.0]], [[0.0] * 3] * 2]).double()
    assert torch.equal(library(combining._trimmed, parts, 0.5), expected)


@on_libraries
def test_peft_linear_is_pefts_formula(library: Library) -> None:
    deltas = [random_delta(10, 8, 2, 1, 0.5), random_delta(10, 8, 2, 2, 2.0)]
    found = library(peft_linear, deltas, [0.7, -0.3])
    weights = [0.7 * 0.5, -0.3 * 2.0]
    up = sum(math.sqrt(abs(w)) * d.up.double() for w, d in zip(weights, deltas, strict=True))
    down = sum(
        math.copysign(math.sqrt(abs(w)), w) * d.down.double()
        for w, d in zip(weights, deltas, strict=True)
    )
    assert torch.allclose(found.up @ found.down, up @ down)


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties", "della", "knots"])
@on_libraries
def test_zero_deltas_combine_to_zero(library: Library, method: str) -> None:
    zero = LowRank(torch.zeros(6, 2), torch.ones(2, 5), 1.0)
    found = combined(library, method, [zero, zero], [1.0, 1.0], Settings())
    assert found.squared_norm == 0
    assert found.truncated(2).shape == (6, 5)


# ----------------------------------------------------------------- similarity


@on_libraries
def test_phi_is_the_overlap_of_leading_subspaces(library: Library) -> None:
    one, other = random_delta(12, 9, 4, 1), random_delta(12, 9, 3, 2)
    left, right = library(lambda a, b: overlap(factor(a), factor(b), (4, 3)), one, other)
    U, _, Vh = torch.linalg.svd(dense(one))
    P, _, Qh = torch.linalg.svd(dense(other))
    assert left.shape == right.shape == (4, 3)
    for i, j in itertools.product(range(1, 5), range(1, 4)):
        expected = float((U[:, :i].mT @ P[:, :j]).square().sum()) / min(i, j)
        assert math.isclose(float(left[i - 1, j - 1]), expected, rel_tol=1e-9)
        expected = float((Vh[:i] @ Qh[:j].mT).square().sum()) / min(i, j)
        assert math.isclose(float(right[i - 1, j - 1]), expected, rel_tol=1e-9)

    def similarity(a: LowRank, b: LowRank, ranks: tuple[int, int]) -> float:
        return subspace_similarity(factor(a), factor(b), ranks)

    assert math.isclose(library(similarity, one, one, (4, 4)), 1, rel_tol=1e-9)
    assert library(similarity, one, other, (0, 3)) == 0


def test_ranks_of_spectra() -> None:
    assert stable_rank([2.0, 2.0]) == 2
    assert math.isclose(effective_rank([3.0, 3.0, 3.0]), 3)
    assert (stable_rank([]), effective_rank([0.0]), energy_rank([0.0], 0.9)) == (0, 0, 0)
    assert energy_rank([100.0, 25.0, 4.0], 0.99) == 3


def test_fixed_prices_are_part_of_the_budget() -> None:
    chance = random.Random(2)
    for _ in range(150):
        count, multiple = chance.randint(1, 4), chance.choice([1, 1, 2])
        items = [
            Item(
                sorted((chance.random() ** 4 for _ in range(chance.randint(2, 4))), reverse=True),
                chance.choice([3, 5, 8]),
                4,
                is_forced=chance.random() < 0.2,
            )
            for _ in range(count)
        ]
        fixed = [chance.randint(0, 12) for _ in range(count)]
        budget = chance.randint(5, 90)

        def size_of(
            ranks: tuple[int, ...] | list[int],
            of: list[Item] = items,
            entries: list[int] = fixed,
        ) -> int:
            used = sum(item.cost * rank for item, rank in zip(of, ranks, strict=True))
            header = sum(entry for entry, rank in zip(entries, ranks, strict=True) if rank)
            return used + header + sum(len(str(rank)) for rank in ranks)

        found = spend(items, budget, size_of=size_of, multiple=multiple)
        options = [
            ranks
            for ranks in itertools.product(range(0, 5, multiple), repeat=count)
            if size_of(ranks) <= budget
            and all(rank or not item.is_forced for item, rank in zip(items, ranks, strict=True))
        ]
        values = [
            sum(item.value(rank) for item, rank in zip(items, ranks, strict=True))
            for ranks in options
        ]
        if not options or max(values) == 0:
            assert not any(found)
            continue
        assert size_of(found) <= budget
        value = sum(item.value(rank) for item, rank in zip(items, found, strict=True))
        assert value >= max(values) - 1e-12


@pytest.mark.slow
def test_a_header_that_grows_costs_no_more_than_it_takes() -> None:
    """Prices have a common divisor, so that a smaller budget may mean a much cheaper choice."""
    items = [
        Item([j**-0.6 for j in range(1, 97)], 128 * price, 96) for price in (24, 15, 32, 24, 15, 32)
    ]

    def size_of(ranks: Sequence[int]) -> int:
        used = sum(item.cost * rank for item, rank in zip(items, ranks, strict=True))
        return used + 8 * (len(str(used)) + sum(len(str(rank)) for rank in ranks))

    for budget in range(300_000, 300_400, 8):
        found = spend(items, budget, size_of=size_of)
        assert budget - 512 < size_of(found) <= budget


@pytest.mark.slow
def test_a_large_budget_is_spent_nearly_as_well_as_by_fractions_and_quickly() -> None:
    chance = random.Random(3)
    items = []
    for _ in range(300):
        cost, cap = 2 * chance.choice([640, 960, 1408, 1920, 2560, 6400, 11520]), 64
        power, size = 0.4 + 1.6 * chance.random(), chance.random()
        items.append(Item([size * j**-power for j in range(1, cap + 1)], cost, cap))
    total = math.fsum(item.value(item.cap) for item in items)
    for share in (0.05, 0.5):
        budget = int(share * sum(item.cost * item.cap for item in items))

        def size_of(ranks: Sequence[int]) -> int:
            return sum(item.cost * rank for item, rank in zip(items, ranks, strict=True))

        start = time.process_time()
        found = spend(items, budget, size_of=size_of)
        assert time.process_time() - start < 3  # a third of a second on a quiet machine
        assert size_of(found) <= budget
        pieces = sorted(((g / i.cost, g, i.cost) for i in items for g in i.gains), reverse=True)
        left, best = budget, 0.0
        for _, gain, cost in pieces:
            best += gain * min(1.0, left / cost)
            left -= min(left, cost)
        value = math.fsum(item.value(rank) for item, rank in zip(items, found, strict=True))
        assert total - value <= 1.001 * (total - best)
