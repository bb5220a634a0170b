"""What the codecs of 8-bit floats share: one rounding, scales, what is refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from loratool.codecs.fp8 import LARGEST, factors_for, rounded
from loratool.codecs.numbers import decode, encode

KINDS = ("F32", "F16", "BF16", "F8_E8M0")


def numbers(dtype: str) -> list[Fraction]:
    """Return all numbers of a float that are not negative, in order."""
    found = decode(np.arange(128, dtype=np.uint8), dtype, (128,))
    return [Fraction(x) for x in found[np.isfinite(found)]]


def nearest(value: Fraction, known: list[Fraction]) -> int:
    """Return the code of the nearest number; halfway the even one."""
    below = max(i for i, number in enumerate(known) if number <= abs(value))
    if below + 1 == len(known):
        return below
    low, high = abs(value) - known[below], known[below + 1] - abs(value)
    return below + (low > high or (low == high and below % 2 == 1))


def beside_ties(random: np.random.Generator, dtype: str, kind: str) -> tuple[np.ndarray, ...]:
    """Return float32 numbers that are ties times a divisor, and their neighbours, and divisors."""
    known = decode(np.arange(128, dtype=np.uint8), dtype, (128,))
    known = known[np.isfinite(known)]
    ties = (known[1:] + known[:-1]) / 2
    wide = np.exp(random.uniform(-9, 3, (ties.size, 3)))
    divisors = decode(encode(wide, kind), kind, wide.shape)
    exact = (ties[:, None] * divisors).astype(np.float32)
    found = [exact]
    for end in (np.float32(np.inf), np.float32(0)):
        near = exact
        for _ in range(2):
            near = np.nextafter(near, end)
            found.append(near)
    return np.stack(found), np.broadcast_to(divisors, (len(found), *divisors.shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(LARGEST))
def test_quotients_of_float32_are_rounded_once(dtype: str, kind: str) -> None:
    """Also where the true quotient is beside a tie by less than float32 sees."""
    values, divisors = beside_ties(np.random.default_rng(3), dtype, kind)
    known = numbers(dtype)
    pairs = zip(values.reshape(-1).tolist(), divisors.reshape(-1).tolist(), strict=True)
    expected = np.array([nearest(Fraction(x) / Fraction(d), known) for x, d in pairs])
    expected = expected.reshape(values.shape)
    assert np.array_equal(rounded(values, divisors, dtype), expected)
    assert np.array_equal(rounded(-values, divisors, dtype), expected | 0x80)
    assert np.array_equal(rounded(values.astype(np.float64), divisors, dtype), expected)
    quotients = (values / divisors.astype(np.float32)).astype(np.float32)
    is_short = kind != "F32"
    assert is_short == np.array_equal(encode(quotients, dtype), expected)


def test_tiny_divisors_and_numbers_are_rounded_once() -> None:
    """Where float32 has fewer bits, short divisors are no proof any more."""
    random = np.random.default_rng(4)
    values = random.integers(1, 4000, 3000).astype(np.uint32).view(np.float32)
    divisors = decode(random.integers(0, 6, 3000, dtype=np.uint8), "F8_E8M0", (3000,))
    divisors = np.concatenate([divisors[:2000], np.full(1000, 2.0**-126 * 1.25)])
    known = numbers("F8_E4M3")
    pairs = zip(values.tolist(), divisors.tolist(), strict=True)
    expected = [nearest(Fraction(x) / Fraction(d), known) for x, d in pairs]
    assert rounded(values, divisors, "F8_E4M3").tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(LARGEST))
def test_no_code_is_larger_than_the_largest(dtype: str, kind: str) -> None:
    peaks = np.exp(np.random.default_rng(5).uniform(-120, 8, (400, 1)))
    peaks[0] = 0
    factors = factors_for(peaks, kind, LARGEST[dtype])
    divisors = decode(factors, kind, factors.shape)
    assert (divisors > 0).all()
    for values in (peaks, peaks.astype(np.float32)):
        codes = rounded(values, divisors, dtype)
        assert np.isfinite(decode(codes, dtype, codes.shape)).all()


def test_a_scale_that_its_dtype_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="F16"):
        factors_for(np.array([[1e30]]), "F16", 448.0)


def test_exponents_are_rounded_up_so_that_nothing_is_cut() -> None:
    peaks = np.array([[448.0, 448.1, 447.9, 896.0]])
    assert factors_for(peaks, "F8_E8M0", 448.0).tolist() == [[127, 128, 127, 128]]
