"""Numbers as FP4 (E2M1): a sign, two bits of exponent, one of mantissa; two codes in a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LARGEST", "in_bytes", "nearest"]

LARGEST: Final = 6.0
HALFWAY: Final = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Where rounding changes from one magnitude to the next; what lies there becomes the even code."""


def nearest(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the codes of numbers, rounded to the nearest and ties to even, at most the largest."""
    magnitudes = np.abs(values)
    codes = (values < 0).astype(np.uint8) << np.uint8(3)
    for code, halfway in enumerate(HALFWAY):
        # A tie goes up where the code below is odd.
        codes += magnitudes >= halfway if code % 2 else magnitudes > halfway
    return codes


def in_bytes(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return two codes in each byte, the first one in its low bits."""
    packed: NDArray[np.uint8] = codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)
    return packed
