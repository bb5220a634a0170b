"""What conversions are made of: views of stored tensors, rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loratool.files.safetensors import read_header
from loratool.values.arrays import Rounded, decode, encode
from loratool.values.expr import Constant, Placed, Stored, block_diagonal, concatenated

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
HARD = [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 3e38, 6e-8, 1e-40, -2.5, np.inf, -np.inf, np.nan]


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Stored, np.ndarray]:
    """A matrix of 6 × 4 in a file, and its values."""
    values = torch.randn(6, 4)
    save_file({"m": values, "x": torch.ones(3)}, tmp_path / "a.safetensors")
    tensor = read_header(tmp_path / "a.safetensors").tensors["m"]
    return Stored(tensor), values.double().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_that_of_torch(dtype: str) -> None:
    values = np.array([*HARD, *np.random.default_rng(0).normal(size=1000) * 100])
    made = Rounded.of(values, dtype)
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(values).to(DTYPES[dtype])
    assert np.array_equal(made.values, expected.double().numpy(), equal_nan=True)
    bits = expected.view(torch.uint8).numpy().reshape(-1)
    finite = ~np.isnan(values).repeat(expected.element_size())
    assert np.array_equal(made.bits.reshape(-1).view(np.uint8)[finite], bits[finite])


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_inverts_rounding(dtype: str, tmp_path: Path) -> None:
    tensor = torch.randn(5, 3).to(DTYPES[dtype])
    save_file({"t": tensor}, tmp_path / "a.safetensors")
    found = decode(read_header(tmp_path / "a.safetensors").tensors["t"])
    assert np.array_equal(found, tensor.double().numpy())
    made = Rounded.of(found, dtype)
    assert made.is_exact and made.is_finite
    assert encode(found, dtype).tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_what_does_not_fit_is_noticed() -> None:
    assert not Rounded.of(np.array([1e6]), "F16").is_finite
    assert Rounded.of(np.array([np.inf]), "F16").is_finite
    assert not Rounded.of(np.array([1 / 3]), "F32").is_exact


class TestViews:
    def test_parts_of_a_stored_matrix(self, stored: tuple[Stored, np.ndarray]) -> None:
        value, truth = stored
        for made, expected in (
            (value.rows(2, 5), truth[2:5]),
            (value.columns(1, 3), truth[:, 1:3]),
            (value.turned(), truth.T),
            (value.turned().turned(), truth),
            (value.turned().rows(1, 3), truth.T[1:3]),
            (value.rows(1, 4).columns(2, 4), truth[1:4, 2:4]),
            (value.reshaped((4, 6)), truth.reshape(4, 6)),
            (value.turned().reshaped((6, 4)), truth.T.reshape(6, 4)),
            (value.scaled(-0.5).rows(0, 2).turned(), -0.5 * truth[:2].T),
            (value.rows(0, 6), truth),
        ):
            assert made.shape == expected.shape
            assert np.array_equal(made.evaluate(), expected)

    def test_plain_views_stay_contiguous(self, stored: tuple[Stored, np.ndarray]) -> None:
        value, _ = stored
        for made in (value.rows(2, 5), value.turned().turned(), value.reshaped((24, 1))):
            assert isinstance(made, Stored)
            assert made.tensor.strides is None

    def test_arrangements(self, stored: tuple[Stored, np.ndarray]) -> None:
        value, truth = stored
        both = concatenated([value, value.rows(0, 2)])
        assert np.array_equal(both.evaluate(), np.concatenate([truth, truth[:2]]))
        assert np.array_equal(both.rows(5, 7).evaluate(), both.evaluate()[5:7])
        assert both.rows(0, 6) == value
        diagonal = block_diagonal([value, None, value.scaled(2)], [6, 3, 6])
        expected = np.zeros((15, 8))
        expected[:6, :4], expected[9:, 4:] = truth, 2 * truth
        assert np.array_equal(diagonal.evaluate(), expected)
        assert np.array_equal(diagonal.turned().evaluate(), expected.T)
        assert np.array_equal(diagonal.rows(4, 11).evaluate(), expected[4:11])
        assert np.array_equal(Constant(2.0, (2, 3), "F32").turned().evaluate(), np.full((3, 2), 2))
        assert not Placed((), (2, 2), "F32").evaluate().any()
