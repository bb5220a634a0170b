"""The ordinary floats: float64, float32, float16 and bfloat16.

bfloat16 is the upper half of a float32. numpy's own conversions of float16 go element by
element; passes over whole blocks take a third of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from loratool.codecs.numbers.minifloat import Minifloat
from loratool.codecs.numbers.number import (
    LARGE,
    Array,
    Codes,
    Number,
    are_finite,
    are_surely_below,
    rounded_to_odd,
)
from loratool.codecs.numbers.scratch import Scratch

__all__ = ["NUMBERS"]


@dataclass(frozen=True, slots=True)
class _Native:
    """A float that numpy computes with."""

    code: np.dtype[Any]

    @np.errstate(over="ignore", under="ignore", invalid="ignore")
    def decode_into(self, codes: Codes, out: Array, scratch: Scratch) -> None:
        np.copyto(out, codes, casting="same_kind")

    @np.errstate(over="ignore", under="ignore", invalid="ignore")
    def encode_into(self, values: Array, out: Codes, scratch: Scratch) -> bool:
        np.copyto(out, values, casting="same_kind")
        return are_finite(out)


class _Bfloat16:
    """The upper half of a float32."""

    code: Final = np.dtype("<u2")

    @np.errstate(invalid="ignore")
    def decode_into(self, codes: Codes, out: Array, scratch: Scratch) -> None:
        single = out if out.dtype == np.float32 else scratch.array("single", out.shape, "<f4")
        bits = single.view(np.uint32)
        np.copyto(bits, codes)
        np.left_shift(bits, np.uint32(16), out=bits)
        if single is not out:
            np.copyto(out, single)

    def encode_into(self, values: Array, out: Codes, scratch: Scratch) -> bool:
        """Add half a unit, less what makes a tie even, to the bits; keep the upper half."""
        if not values.size:
            return True
        single = values if values.dtype == np.float32 else rounded_to_odd(values.astype("f8"))
        bits = single.view(np.uint32)
        rounded = scratch.array("rounded", values.shape, np.uint32)
        np.right_shift(bits, np.uint32(16), out=rounded)
        np.bitwise_and(rounded, np.uint32(1), out=rounded)
        np.add(rounded, np.uint32(0x7FFF), out=rounded)
        np.add(rounded, bits, out=rounded)
        np.right_shift(rounded, np.uint32(16), out=rounded)
        np.copyto(out, rounded, casting="unsafe")
        if are_surely_below(single, LARGE):
            return True
        # From here on rounding leads to infinity; the largest NaNs would wrap around.
        positive = bits.view(np.int32).max() < 0x7F7F8000
        if positive and bits.max() < 0xFF7F8000:
            return True
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[is_nan] = bits[is_nan] >> np.uint32(16) | np.uint32(0x0040)
        return False


class _Float16:
    """IEEE's half precision, as PyTorch and numpy convert it."""

    layout: Final = Minifloat(
        16, mantissa=10, bias=15, largest=0x7BFF, overflow=0x7C00, nan=0x7E00, payload=0x3FF
    )
    code: Final = layout.code

    @np.errstate(over="ignore", invalid="ignore", under="ignore")
    def decode_into(self, codes: Codes, out: Array, scratch: Scratch) -> None:
        """Move the bits to where float32 has them, and multiply by the difference in bias.

        As float32 the subnormal numbers are such too, so that the product is right for them.
        """
        single = out if out.dtype == np.float32 else scratch.array("single", out.shape, "<f4")
        bits = single.view(np.uint32)
        np.copyto(bits.view(np.int32), codes.view(np.int16))
        np.left_shift(bits, np.uint32(13), out=bits)
        np.bitwise_and(bits, np.uint32(0x8FFFE000), out=bits)
        np.multiply(single, np.float32(2.0**112), out=single)
        # Infinity and NaN have become 2^16 and more.
        if single.size and (single.max() >= 65536.0 or single.min() <= -65536.0):
            np.bitwise_or(bits, np.uint32(0x7F800000), out=bits, where=codes & 0x7C00 == 0x7C00)
        if single is not out:
            np.copyto(out, single)

    def encode_into(self, values: Array, out: Codes, scratch: Scratch) -> bool:
        return self.layout.encode_into(values, out, scratch)


NUMBERS: Final[dict[str, Number]] = {
    "F64": _Native(np.dtype("<f8")),
    "F32": _Native(np.dtype("<f4")),
    "F16": _Float16(),
    "BF16": _Bfloat16(),
}
