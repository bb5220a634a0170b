"""Element types: every pattern one way, every tie and its neighbours the other, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.codecs.numbers import decode, decode_into, encode, encode_into, number
from loratool.codecs.numbers.number import rounded_to_odd
from loratool.codecs.numbers.scratch import Scratch
from loratool.files.dtypes import DTYPES

SIXTEEN = ("F16", "BF16")
EIGHT = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")
BITS = {1: torch.uint8, 2: torch.int16}


def torch_type(name: str) -> torch.dtype:
    return getattr(torch, DTYPES[name].torch_name or "")


def every_code(name: str) -> np.ndarray:
    kind = number(name).code
    return np.arange(1 << (8 * kind.itemsize)).astype(kind)


def decoded_by_torch(codes: np.ndarray, name: str) -> np.ndarray:
    raw = torch.frombuffer(bytearray(codes.tobytes()), dtype=torch_type(name))
    return raw.double().numpy()


def encoded_by_torch(values: np.ndarray, name: str) -> np.ndarray:
    made = torch.from_numpy(values).to(torch_type(name))
    return made.view(BITS[made.itemsize]).numpy().view(number(name).code)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("name", SIXTEEN + EIGHT)
def test_every_pattern_is_decoded(name: str, kind: type) -> None:
    codes = every_code(name)
    expected = decoded_by_torch(codes, name)
    found = decode(codes.tobytes(), name, codes.shape, kind)
    assert found.dtype == kind
    np.testing.assert_array_equal(found, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found[numbers]), np.signbit(expected[numbers]))


def test_nan_of_float16_keeps_its_sign_and_payload() -> None:
    codes = every_code("F16")
    codes = codes[codes & 0x7FFF > 0x7C00]
    bits = decode(codes, "F16", codes.shape, np.float32).view(np.uint32)
    np.testing.assert_array_equal(bits, codes.view(np.float16).astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("name", SIXTEEN + EIGHT)
def test_every_number_comes_back_as_its_own_code(name: str, kind: type) -> None:
    codes = every_code(name)
    values = decode(codes, name, codes.shape, kind)
    back = encode(values, name)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(back[numbers], codes[numbers])
    assert np.isnan(decode(back[~numbers], name, back[~numbers].shape)).all()


def ties(name: str) -> np.ndarray:
    """Return all numbers, all ties between neighbours, and what lies just beside each."""
    finite = decode(every_code(name), name, every_code(name).shape)
    finite = np.unique(finite[np.isfinite(finite)])
    step = finite[-1] - finite[-2]
    beyond = finite[-1] + step * np.array([0.25, 0.5, 1.0, 8.0, 1e6])
    points = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2, beyond, -beyond, [0.0, -0.0]])
    exact = points[np.abs(points) < 1e38].astype(np.float32)
    assert np.array_equal(exact, points[np.abs(points) < 1e38])
    with np.errstate(over="ignore"):
        return np.concatenate(
            [
                exact,
                np.nextafter(exact, np.float32(np.inf)),
                np.nextafter(exact, np.float32(-np.inf)),
            ]
        )


@pytest.mark.parametrize("name", SIXTEEN + EIGHT)
def test_ties_go_to_even_and_what_is_too_large_as_in_torch(name: str) -> None:
    values = ties(name)
    assert values.size > 700
    np.testing.assert_array_equal(encode(values, name), encoded_by_torch(values, name))


@pytest.mark.parametrize("name", SIXTEEN + EIGHT)
def test_float64_is_rounded_once(name: str) -> None:
    """Just beside a tie by less than float32 sees, the nearer neighbour wins."""
    values = np.split(ties(name), 3)[0].astype(np.float64)
    for direction, near in ((np.inf, np.float32(np.inf)), (-np.inf, np.float32(-np.inf))):
        beside = np.nextafter(values, direction)
        further = np.nextafter(values.astype(np.float32), near)
        subnormal = np.abs(values) < 2.0**-125  # there a float32 is too far
        numbers = np.isfinite(values) & ~subnormal
        np.testing.assert_array_equal(encode(beside[numbers], name), encode(further[numbers], name))


def test_float64_between_a_tie_and_its_float32() -> None:
    tie = 1.0 + 2.0**-8
    assert encode(np.array([tie, tie + 1e-12, tie - 1e-12]), "BF16").tolist() == [
        0x3F80, 0x3F81, 0x3F80,
    ]  # fmt: skip
    odd = 1.0 + 3 * 2.0**-8
    assert encode(np.array([odd, odd - 1e-12]), "BF16").tolist() == [0x3F82, 0x3F81]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
@pytest.mark.parametrize("name", SIXTEEN + EIGHT)
@pytest.mark.slow
def test_any_float32_is_rounded_as_in_torch(name: str, bits: list[int]) -> None:
    values = np.array(bits, dtype=np.uint32).view(np.float32)
    found, expected = encode(values, name), encoded_by_torch(values, name)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(found[numbers], expected[numbers])
    assert np.isnan(decode(found[~numbers], name, (int((~numbers).sum()),))).all()


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFFC00000, 0x7FFF8000])
@pytest.mark.parametrize("name", SIXTEEN)
def test_nan_stays_nan_with_its_sign(name: str, pattern: int) -> None:
    values = np.array([1.0, 0.0, 2.0], dtype=np.float32)
    values.view(np.uint32)[1] = pattern
    out = np.empty(3, dtype=np.uint16)
    assert not encode_into(values, name, out)
    back = decode(out, name, (3,))
    assert np.isnan(back[1]) and np.signbit(back[1]) == bool(pattern >> 31)
    assert back[[0, 2]].tolist() == [1.0, 2.0]
    quiet = 0x0200 if name == "F16" else 0x0040
    assert out[1] & quiet


@pytest.mark.parametrize(
    ("name", "largest", "beyond"),
    [
        ("BF16", 3.3895313892515355e38, 3.39617752923046e38),
        ("F16", 65519.996, 65520.0),
        ("F8_E4M3", 464.0, 464.1),
        ("F8_E5M2", 61439.0, 61440.0),
        ("F8_E4M3FNUZ", 247.9, 248.0),
        ("F8_E5M2FNUZ", 61439.0, 61440.0),
        ("F32", 3.4028234663852886e38, 3.4028235677973366e38),
    ],
)
def test_what_does_not_fit_is_told(name: str, largest: float, beyond: float) -> None:
    for sign in (1, -1):
        out = np.empty(2, dtype=number(name).code)
        assert encode_into(np.array([sign * largest, 1.0]), name, out)
        assert not encode_into(np.array([1.0, sign * beyond]), name, out)
        assert not encode_into(np.array([sign * np.inf, 1.0]), name, out)
        assert not encode_into(np.array([np.nan, 1.0], dtype=np.float32), name, out)


@settings(deadline=None, max_examples=300)
@given(st.floats(allow_nan=False))
def test_rounding_to_odd_goes_to_a_neighbour_and_marks_what_is_lost(value: float) -> None:
    single = rounded_to_odd(np.array([value]))[0]
    if float(single) == value:
        return
    assert single.view(np.uint32) & 1
    with np.errstate(over="ignore"):
        low, high = (np.nextafter(single, np.float32(end)) for end in (-np.inf, np.inf))
    assert float(low) <= value <= float(high)


@pytest.mark.parametrize("name", ["F64", "F32", "I64", "I8", "U16", "BOOL"])
def test_numpys_own_types(name: str) -> None:
    values = np.array([0, 1, 1, 0] if name == "BOOL" else [0, 1, 100, 3])
    raw = values.astype(number(name).code)
    np.testing.assert_array_equal(decode(raw.tobytes(), name, (2, 2)), values.reshape(2, 2))
    np.testing.assert_array_equal(encode(values.astype(np.float64), name), raw)


def test_shapes_of_any_kind_and_reused_memory() -> None:
    scratch = Scratch()
    for shape in ((), (0,), (3, 0), (5,), (2, 3, 4), (1,)):
        values = np.full(shape, 1.5, dtype=np.float32)
        for name in SIXTEEN + EIGHT:
            codes = np.empty(shape, dtype=number(name).code)
            assert encode_into(values, name, codes, scratch)
            back = np.empty(shape, dtype=np.float64)
            decode_into(codes, name, back, scratch)
            assert (back == (2.0 if name == "F8_E8M0" else 1.5)).all()
    first = scratch.array("a", (4, 4), np.float32)
    assert np.shares_memory(first, scratch.array("a", (2, 2), np.uint8))
    assert not np.shares_memory(first, scratch.array("b", (2, 2), np.uint8))
