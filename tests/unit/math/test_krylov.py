"""The basis for the leading part of a matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratool.math.extraction import Decomposition, leading_part
from loratool.math.krylov import Krylov, basis_size
from loratool.math.tiles import NeedsAllRowsError, RowTiles


def matrix(kind: str, m: int, n: int, seed: int = 0) -> np.ndarray:
    """Return a matrix with a spectrum of some kind, float32."""
    random = np.random.default_rng(seed)
    if kind == "flat":
        return random.standard_normal((m, n), np.float32)
    if kind.startswith("rank"):
        low = random.standard_normal((m, 16)) @ random.standard_normal((16, n)) / math.sqrt(m)
        return (low + 0.01 * random.standard_normal((m, n))).astype(np.float32)
    k = min(m, n)
    left, right = (np.linalg.qr(random.standard_normal((size, k))).Q for size in (m, n))
    places = np.arange(1, k + 1)
    values = np.exp(-places / 20) if kind == "e" else places ** -float(kind.removeprefix("j^-"))
    return np.asarray((left * values) @ right.T, dtype=np.float32)


def excess(delta: np.ndarray, rank: int, seed: int = 1) -> tuple[float, float]:
    """Return the error over the optimum, and the error that was told over the true one."""
    wide = delta.astype(np.float64)
    values = np.linalg.svd(wide, compute_uv=False)
    found = leading_part(delta, rank, np.random.default_rng(seed), method="randomised")
    error = float(np.linalg.norm(wide - found.up.astype(np.float64) @ found.down))
    optimum = math.sqrt(float((values[rank:] ** 2).sum()))
    return error / optimum, math.sqrt(found.squared_residual) / error


@pytest.mark.parametrize("kind", ["flat", "rank 16", "j^-0.1", "j^-0.5", "j^-1", "j^-1.5", "e"])
@pytest.mark.parametrize("rank", [1, 8, 16, 24, 48, 96])
@pytest.mark.parametrize("shape", [(300, 420), (520, 400)])
@pytest.mark.slow
def test_the_error_is_at_most_half_a_percent_over_the_optimum(
    kind: str, rank: int, shape: tuple[int, int]
) -> None:
    over, told = excess(matrix(kind, *shape), rank)
    assert over < 1.005
    assert told == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("kind", ["flat", "rank 16", "j^-0.5"])
@pytest.mark.parametrize("rank", [4, 16, 64, 160])
@pytest.mark.slow
def test_it_is_so_in_matrices_that_are_large_enough_for_two_blocks(kind: str, rank: int) -> None:
    delta = matrix(kind, 2048, 2100)
    wide = delta.astype(np.float64)
    squares = np.linalg.eigvalsh(wide @ wide.T)[::-1].clip(min=0)
    found = leading_part(delta, rank, np.random.default_rng(1))
    assert not found.is_exact
    assert math.sqrt(found.squared_residual / squares[rank:].sum()) < 1.005


@given(
    m=st.integers(20, 90),
    n=st.integers(20, 90),
    rank=st.integers(1, 6),
    rows=st.integers(1, 90),
    power=st.integers(-12, 12),
)
def test_few_rows_that_differ_are_found_wherever_they_are(
    m: int, n: int, rank: int, rows: int, power: int
) -> None:
    """A sketch that adds rows up must not lose those that meet in one sum."""
    random = np.random.default_rng(m * n + rows)
    delta = np.zeros((m, n))
    places = random.choice(m, min(rows, m), replace=False)
    delta[places] = random.standard_normal((len(places), n)) * 10.0**power
    found = leading_part(delta.astype(np.float32), rank, random, method="randomised")
    values = np.linalg.svd(delta, compute_uv=False)
    error = float(np.linalg.norm(delta - found.up.astype(np.float64) @ found.down))
    optimum = math.sqrt(float((values[rank:] ** 2).sum()))
    assert error <= 1.02 * optimum + 1e-5 * float(np.linalg.norm(values))


@pytest.mark.parametrize("every", [16, 24, 32, 40])
def test_rows_that_differ_at_regular_distances(every: int) -> None:
    delta = np.zeros((900, 700), np.float32)
    delta[::every] = np.random.default_rng(0).standard_normal(delta[::every].shape)
    over, _ = excess(delta, 16)
    assert over < 1.005


def test_more_ranks_add_to_the_basis_and_begin_nothing_again() -> None:
    delta = matrix("j^-0.5", 500, 600)
    found = Decomposition(delta, np.random.default_rng(2), method="randomised")
    values = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    sizes = []
    for rank in (4, 8, 32, 64):
        part = found.leading(rank)
        krylov = found._krylov
        assert krylov is not None
        sizes.append(krylov._basis.shape[1])
        optimum = float((values[rank:] ** 2).sum())
        assert math.sqrt(part.squared_residual / optimum) < 1.005
    assert sizes == sorted(sizes)
    assert sizes[-1] < 64 * 3 + basis_size(4, delta.shape) + 64 * 3
    again = found.leading(8)
    assert krylov._basis.shape[1] == sizes[-1]
    assert again.up.shape == (500, 8)


def repeated(kind: str, size: int = 400) -> np.ndarray:
    """Return a matrix whose singular values repeat, so that blocks soon lead nowhere new."""
    random = np.random.default_rng(5)
    if kind == "identity":
        return np.eye(size, dtype=np.float32) * np.float32(0.01)
    if kind == "permutation":
        delta = np.eye(size, dtype=np.float32)[random.permutation(size)]
        delta[size // 5 :] = 0
        return delta
    place = np.subtract.outer(np.arange(size), np.arange(size)) % size
    return random.standard_normal(size).astype(np.float32)[place]  # a circulant


@pytest.mark.parametrize("kind", ["identity", "permutation", "circulant"])
@pytest.mark.parametrize("ranks", [(32, 64, 96), (8, 32, 64), (16,), (64,)])
@pytest.mark.slow
def test_singular_values_that_repeat_are_no_end(kind: str, ranks: tuple[int, ...]) -> None:
    delta = repeated(kind)
    values = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    found = Decomposition(delta, np.random.default_rng(2), method="randomised")
    for rank in ranks:
        part = found.leading(rank)
        optimum = math.sqrt(float((values[rank:] ** 2).sum()))
        error = float(np.linalg.norm(delta - part.up.astype(np.float64) @ part.down))
        assert error <= 1.005 * optimum + 1e-5 * float(np.linalg.norm(values))


def test_columns_of_the_basis_are_orthonormal_or_zero() -> None:
    for delta in (
        matrix("flat", 300, 350),
        matrix("j^-2", 300, 350),
        np.outer(np.arange(300.0), np.ones(350)).astype(np.float32),
    ):
        krylov = Krylov(delta, float(np.linalg.norm(delta)), np.random.default_rng(0))
        krylov.leading(20)
        products = krylov._basis.T.astype(np.float64) @ krylov._basis
        lengths = np.diag(products)
        assert (np.isclose(lengths, 1, atol=1e-3) | (lengths == 0)).all()
        assert np.abs(products - np.diag(lengths)).max() < 1e-3


def test_what_a_matrix_of_one_rank_leaves_is_no_direction_of_weight() -> None:
    """Beyond its rank a block is rounding; it must not be longer than one, nor lean on others."""
    delta = np.outer(np.arange(300.0), np.ones(350)).astype(np.float32)
    norm = float(np.linalg.norm(delta.astype(np.float64)))
    U, P, values = Krylov(delta, norm, np.random.default_rng(0)).leading(20)
    assert values[0] == pytest.approx(norm, rel=1e-6)
    assert values[1:].max() < 1e-5 * norm
    assert float(np.linalg.norm(delta - U.astype(np.float64) @ P)) < 1e-5 * norm


def test_the_transpose_has_the_same_error() -> None:
    delta = matrix("j^-0.3", 400, 700)
    one = leading_part(delta, 20, np.random.default_rng(0), method="randomised")
    other = leading_part(delta.T, 20, np.random.default_rng(0), method="randomised")
    np.testing.assert_array_equal(one.up, other.down.T)
    assert one.squared_residual == other.squared_residual


@pytest.mark.parametrize("is_turned", [False, True])
def test_a_matrix_by_tiles_of_rows_is_the_matrix(is_turned: bool) -> None:
    delta = torch.from_numpy(matrix("j^-0.5", 400, 500))
    made: list[int] = []

    def rows(start: int, count: int) -> torch.Tensor:
        made.append(count)
        return delta[start : start + count]

    tiles = RowTiles(400, 70, rows, delta[:0])
    found = Decomposition(
        tiles.mT if is_turned else tiles, np.random.default_rng(0), method="randomised"
    ).leading(12)
    wanted = leading_part(
        delta.mT if is_turned else delta, 12, np.random.default_rng(0), method="randomised"
    )
    assert max(made) == 70
    torch.testing.assert_close(found.up @ found.down, wanted.up @ wanted.down, atol=1e-5, rtol=0)
    assert found.squared_residual == pytest.approx(wanted.squared_residual, rel=1e-4)


def test_what_needs_all_rows_says_so() -> None:
    delta = torch.randn(100, 120)
    tiles = RowTiles(100, 30, lambda start, count: delta[start : start + count], delta[:0])
    with pytest.raises(NeedsAllRowsError):
        Decomposition(tiles, np.random.default_rng(0)).leading(90)
