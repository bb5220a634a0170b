"""Floats of few bits, by their layout: the arithmetic that float16 and the 8-bit floats share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.numbers.number import Array, Codes, are_surely_below, rounded_to_odd
from loratool.codecs.numbers.scratch import Scratch

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Minifloat"]

MAGNITUDE: Final = np.uint32(0x7FFFFFFF)
EXPONENT: Final = np.uint32(0x7F800000)
MANTISSA: Final = 23
BIAS: Final = 127


@dataclass(frozen=True, slots=True)
class Minifloat:
    """A sign, an exponent and a mantissa, with subnormal numbers, in 8 or 16 bits.

    Attributes:
        width: Bits of an element.
        mantissa: Bits of its mantissa.
        bias: What is subtracted from the exponent.
        largest: The code of the largest finite number.
        overflow: The code of what is larger than that once it is rounded.
        nan: The code of NaN.
        is_signed: Whether NaN, zero and what is too large keep their signs.
        payload: Bits of a NaN's mantissa that are kept.
    """

    width: int
    mantissa: int
    bias: int
    largest: int
    overflow: int
    nan: int
    is_signed: bool = True
    payload: int = 0

    @property
    def code(self) -> np.dtype[Any]:
        """Elements are stored as their bits."""
        return np.dtype(f"<u{self.width // 8}")

    @np.errstate(over="ignore", invalid="ignore", under="ignore")
    def encode_into(self, values: Array, out: Codes, scratch: Scratch) -> bool:
        """Round by adding and subtracting a number with the spacing of the value's binade.

        What is left has the bits of the code, at another place.
        """
        if not values.size:
            return True
        single = values if values.dtype == np.float32 else rounded_to_odd(values.astype("f8"))
        bits = single.view(np.uint32)
        shift = MANTISSA - self.mantissa
        spacing = scratch.array("spacing", values.shape, np.uint32)
        np.bitwise_and(bits, EXPONENT, out=spacing)
        np.maximum(spacing, np.uint32((BIAS + 1 - self.bias) << MANTISSA), out=spacing)
        # One and a half times 2^shift times the power of two below the number.
        np.add(spacing, np.uint32((shift << MANTISSA) | (1 << (MANTISSA - 1))), out=spacing)
        rounded = scratch.array("rounded", values.shape, np.float32)
        np.add(single, spacing.view(np.float32), out=rounded)
        np.subtract(rounded, spacing.view(np.float32), out=rounded)
        np.multiply(rounded, np.float32(2.0 ** (self.bias - BIAS)), out=rounded)
        codes = rounded.view(np.uint32)
        limit = self.largest << shift
        in_range = are_surely_below(single, 2.0 ** ((self.largest >> self.mantissa) - self.bias))
        if not in_range:
            in_range = bool(codes.view(np.int32).max() <= limit)
            in_range = in_range and bool(codes.max() <= (limit | 1 << 31))
        sign = spacing
        np.right_shift(bits, np.uint32(32 - self.width), out=sign)
        np.bitwise_and(sign, np.uint32(1 << (self.width - 1)), out=sign)
        too_large = None if in_range else (codes & MAGNITUDE) > np.uint32(limit)
        np.right_shift(codes, np.uint32(shift), out=codes)
        if not self.is_signed:
            np.bitwise_and(codes, np.uint32((1 << (self.width - 1)) - 1), out=codes)
            np.multiply(sign, codes != 0, out=sign)
        np.bitwise_or(codes, sign, out=codes)
        np.copyto(out, codes, casting="unsafe")
        if too_large is not None:
            self._mend(bits, too_large, out)
        return in_range

    @property
    def _unsigned(self) -> int:
        return (1 << (self.width - 1)) - 1

    def _mend(self, bits: NDArray[np.uint32], too_large: NDArray[np.bool_], out: Codes) -> None:
        """Write the codes of NaN, of infinity and of what is too large."""
        odd = bits[too_large]
        magnitude = odd & MAGNITUDE
        kept = (magnitude >> np.uint32(MANTISSA - self.mantissa)) & np.uint32(self.payload)
        codes = np.where(magnitude > EXPONENT, np.uint32(self.nan) | kept, np.uint32(self.overflow))
        if self.is_signed:
            codes |= (odd >> np.uint32(32 - self.width)) & np.uint32(1 << (self.width - 1))
        out[too_large] = codes

    def table(self) -> NDArray[np.float32]:
        """Return the numbers of all codes of an 8-bit float, ``(256,)``."""
        codes = np.arange(1 << self.width)
        low = codes & ((1 << self.mantissa) - 1)
        high = (codes & self._unsigned) >> self.mantissa
        normal = np.ldexp(low + (1 << self.mantissa) * 1.0, high - self.bias - self.mantissa)
        subnormal = np.ldexp(low * 1.0, 1 - self.bias - self.mantissa)
        values = np.where(high > 0, normal, subnormal)
        values = np.where(codes >> (self.width - 1), -values, values)
        magnitude = codes & self._unsigned
        if not self.is_signed:
            values[codes == self.nan] = np.nan
        else:
            values[magnitude > self.largest] = np.nan
            if self.overflow > self.largest:
                values[codes == self.overflow] = np.inf
                values[codes == self.overflow | self._unsigned + 1] = -np.inf
        made: NDArray[np.float32] = values.astype(np.float32)
        return made
