"""FP4 (E2M1): a sign, two bits of exponent, one of mantissa; two codes a byte, low nibble first."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["LARGEST", "decode_pairs", "encode_pairs", "nearest", "numbers"]

LARGEST: Final = 6.0
MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
HALFWAY: Final = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Where rounding changes from one magnitude to the next; what lies there becomes the even code."""


def numbers(kind: DTypeLike) -> NDArray[Any]:
    """Return what the sixteen codes stand for."""
    return np.array([*MAGNITUDES, *(-value for value in MAGNITUDES)], kind)


@cache
def _pairs(kind: str) -> NDArray[Any]:
    """Return both numbers of each byte, as one element of twice the size."""
    codes = np.arange(256)
    pairs = np.stack([numbers(kind)[codes & 15], numbers(kind)[codes >> 4]], axis=1)
    return pairs.view({"f": "c8", "d": "c16"}[np.dtype(kind).char])[:, 0].copy()


def decode_pairs(data: NDArray[np.uint8], kind: DTypeLike) -> NDArray[Any]:
    """Return the numbers in bytes, twice as many along the last axis."""
    found: NDArray[Any] = _pairs(np.dtype(kind).char).take(data, mode="clip").view(kind)
    return found


def nearest(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the codes of numbers, rounded to the nearest and ties to even, at most the largest."""
    magnitudes = np.abs(values)
    codes = (values < 0).astype(np.uint8) << np.uint8(3)
    for code, halfway in enumerate(HALFWAY):
        # A tie goes up where the code below is odd.
        codes += magnitudes >= halfway if code % 2 else magnitudes > halfway
    return codes


def encode_pairs(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return bytes of two codes each, half as many along the last axis."""
    packed: NDArray[np.uint8] = codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)
    return packed
