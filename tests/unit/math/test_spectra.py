"""Transforms of sparse spectra, whole and row by row, against the dense transform."""

from __future__ import annotations

import numpy as np
import pytest

from loratool.math.spectra import SparseSpectrum


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 6), (6, 1), (7, 5), (8, 6), (5, 8), (16, 33), (32, 32)]
)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_rows_are_those_of_the_dense_transform(shape: tuple[int, int], share: float) -> None:
    draws = np.random.RandomState(3)
    out, into = shape
    chosen = draws.permutation(out * into)[: round(share * out * into)]
    places, values = np.unravel_index(chosen, shape), draws.standard_normal(len(chosen))
    dense = np.zeros(shape)
    dense[places] = values
    wanted = np.fft.ifft2(dense).real
    found = SparseSpectrum(values, places, out, into)
    np.testing.assert_allclose(found.rows(0, out), wanted, rtol=0, atol=1e-15)
    for start in range(out):
        np.testing.assert_allclose(
            found.rows(start, min(out, start + 3)), wanted[start : start + 3], rtol=0, atol=1e-15
        )
