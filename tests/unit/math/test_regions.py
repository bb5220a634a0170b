"""A region of a dense delta is that of the whole, whichever rows and columns are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.math.exact_variants import kronecker_halves, kronecker_part
from loratool.variants.loha import Hadamard

sizes = st.integers(1, 5)


@st.composite
def spans(draw: Any, length: int) -> range:
    start = draw(st.integers(0, length - 1))
    return range(start, draw(st.integers(start + 1, length)))


@settings(deadline=None, max_examples=80)
@given(st.data(), sizes, sizes, sizes, sizes, st.sampled_from([1, 4]), st.integers(0, 99))
def test_a_part_of_a_kronecker_product(
    data: Any, a: int, b: int, c: int, d: int, kernel: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    w1, w2_a = random.standard_normal((a, c)), random.standard_normal((b, 2))
    w2_b = random.standard_normal((2, d * kernel))
    left, right = kronecker_halves(w1, (w2_a, w2_b))
    whole = np.kron(w1[:, :, None], (w2_a @ w2_b).reshape(b, d, kernel))
    assert whole.shape == (a * b, c * d, kernel)
    rows, columns = data.draw(spans(a * b)), data.draw(spans(c * d))
    part = kronecker_part(left, right, rows, columns, kernel)
    wanted = whole[rows.start : rows.stop, columns.start : columns.stop]
    np.testing.assert_allclose(part, wanted, rtol=1e-13, atol=1e-13)


@settings(deadline=None, max_examples=80)
@given(st.data(), sizes, sizes, st.sampled_from([(), (2, 2)]), st.integers(0, 99))
def test_a_part_of_a_product_element_by_element(
    data: Any, out: int, into: int, kernel: tuple[int, ...], seed: int
) -> None:
    random, places = np.random.default_rng(seed), int(np.prod(kernel))
    halves = [
        (random.standard_normal((out, r)), random.standard_normal((r, into * places)))
        for r in (1, 3)
    ]
    (up1, down1), (up2, down2) = halves
    whole = (1.5 * (up1 @ down1) * (up2 @ down2)).reshape(out, into, *kernel)
    change = Hadamard((halves[0], halves[1]), 1.5)
    rows, columns = data.draw(spans(out)), data.draw(spans(into))
    weight = random.standard_normal((len(rows), len(columns), *kernel))
    wanted = whole[rows.start : rows.stop, columns.start : columns.stop]
    found = change.difference(weight, rows.start, columns.start)
    np.testing.assert_allclose(found, wanted, rtol=1e-13, atol=1e-13)
    moved = change.changed(weight, rows.start, columns.start)
    np.testing.assert_allclose(moved, weight + wanted, rtol=1e-13, atol=1e-13)
