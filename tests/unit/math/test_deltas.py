"""Deltas on blocks: the laws, against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.math.deltas import (
    Additive,
    Delta,
    Interpolated,
    Offset,
    Placed,
    Rows,
    WeightDecomposed,
    column_norms,
)
from loratool.math.lowrank import LowRank, is_power_of_two, stack
from loratool.math.principal import kasa_residual, olora_residual, pissa_residual

ROWS, COLUMNS = 23, 17


def low_rank(
    rows: int = ROWS, columns: int = COLUMNS, rank: int = 3, scale: float = 1.7
) -> LowRank:
    return LowRank(
        torch.randn(rows, rank, dtype=torch.float64),
        torch.randn(rank, columns, dtype=torch.float64),
        scale,
    )


def by_blocks(delta: Delta, weight: torch.Tensor, block_rows: int) -> torch.Tensor:
    """Apply a delta block by block and put the weight together again."""
    parts = []
    for start in range(0, weight.shape[0], block_rows):
        original = weight[start : start + block_rows]
        block = original.clone()
        delta.apply(block, original, start)
        parts.append(block)
    return torch.cat(parts)


@pytest.mark.parametrize("block_rows", [1, 4, 7, ROWS])
@pytest.mark.parametrize("scale", [1.7, 2.0, -0.5, 0.0])
def test_additive_is_base_plus_dense(block_rows: int, scale: float) -> None:
    weight, delta = torch.randn(ROWS, COLUMNS, dtype=torch.float64), low_rank(scale=scale)
    torch.testing.assert_close(
        by_blocks(Additive(delta), weight, block_rows), weight + delta.dense()
    )


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, ROWS), st.integers(0, 9), st.integers(0, 5), st.integers(1, 9), st.integers(1, 8)
)
def test_placed_changes_its_region_alone(
    block_rows: int, row: int, column: int, rows: int, columns: int
) -> None:
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    delta = low_rank(rows, columns)
    expected = weight.clone()
    expected[row : row + rows, column : column + columns] += delta.dense()
    torch.testing.assert_close(by_blocks(Placed(delta, row, column), weight, block_rows), expected)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("weight_of", [1.0, 0.3])
def test_weight_decomposed_has_the_magnitudes_as_norms(by_column: bool, weight_of: float) -> None:
    weight, delta = torch.randn(ROWS, COLUMNS, dtype=torch.float64), low_rank()
    magnitude = torch.rand(COLUMNS if by_column else ROWS, dtype=torch.float64) + 0.5
    norms = None
    if by_column:
        blocks = ((i, weight[i : i + 5].clone()) for i in range(0, ROWS, 5))
        norms = column_norms(blocks, Additive(delta), COLUMNS)
    decomposed = WeightDecomposed(Additive(delta), magnitude, norms, weight_of)
    moved = weight + delta.dense()
    axis = 0 if by_column else 1
    full = moved * (magnitude / moved.norm(dim=axis)).unsqueeze(axis)
    torch.testing.assert_close(
        by_blocks(decomposed, weight, 6), weight + weight_of * (full - weight)
    )
    if weight_of == 1:
        torch.testing.assert_close(by_blocks(decomposed, weight, 6).norm(dim=axis), magnitude)


def test_rows_offsets_and_interpolations() -> None:
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    values = torch.randn(2, COLUMNS, dtype=torch.float64)
    expected = weight.clone()
    expected[[7, 2]] = values
    assert torch.equal(by_blocks(Rows((7, 2), values), weight, 5), expected)
    saved = torch.randn(ROWS, COLUMNS, dtype=torch.float64)

    def rows(start: int, count: int) -> torch.Tensor:
        return saved[start : start + count]

    offset = Offset(rows, -2.5, ROWS, COLUMNS)
    torch.testing.assert_close(by_blocks(offset, weight, 5), weight - 2.5 * saved)

    assert torch.equal(by_blocks(Interpolated(rows, 1.0), weight, 5), saved)
    torch.testing.assert_close(
        by_blocks(Interpolated(rows, 0.25), weight, 5), weight + 0.25 * (saved - weight)
    )


def test_copies_in_a_narrower_dtype_do_not_cost_precision() -> None:
    weight = torch.randn(ROWS, COLUMNS)
    copy = weight.bfloat16()
    copy[3, 4] = 9.0
    blended = by_blocks(
        Interpolated(
            lambda start, count: copy[start : start + count].float(),
            1.0,
            rounded=lambda values: values.bfloat16().float(),
        ),
        weight,
        5,
    )
    expected = weight.clone()
    expected[3, 4] = 9.0
    assert torch.equal(blended, expected)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 5), st.floats(-3, 3)), min_size=1, max_size=4))
def test_stack_is_the_sum(parts: list[tuple[int, float]]) -> None:
    terms = [low_rank(rank=rank, scale=scale) for rank, scale in parts]
    expected = sum(
        (term.dense() for term in terms), torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    )
    torch.testing.assert_close(stack(terms).dense(), expected)


def test_transposes_and_shapes() -> None:
    delta = low_rank()
    torch.testing.assert_close(delta.mT.dense(), delta.dense().mT)
    assert delta.shape == (ROWS, COLUMNS)
    assert delta.rank == 3


def test_powers_of_two() -> None:
    assert all(is_power_of_two(x) for x in (0.0, 1.0, -2.0, 0.125, 2.0**-40))
    assert not any(is_power_of_two(x) for x in (3.0, 0.1, -1.5))


def test_principal_parts() -> None:
    weight = torch.randn(9, 7, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(
        pissa_residual(weight, 2), (U[:, 2:] * S[2:]) @ Vh[2:], atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        kasa_residual(weight, 2), (U[:, :5] * S[:5]) @ Vh[:5], atol=1e-12, rtol=0
    )
    assert torch.linalg.matrix_rank(olora_residual(weight, 2, 1.0)) == 5
