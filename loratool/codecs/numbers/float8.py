"""The 8-bit floats, read by look-up, two at a time, rounded as PyTorch rounds them.

What is too large becomes the largest number of E4M3, infinity in E5M2, and NaN in the other two,
which have neither infinities nor a negative zero (FNUZ, AMD's).
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np

from loratool.codecs.numbers.minifloat import Minifloat
from loratool.codecs.numbers.number import Array, Codes, Number, rounded_to_odd
from loratool.codecs.numbers.scratch import Scratch

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["NUMBERS"]

MANY: Final = 1 << 12
"""From so many codes on, looking up two at once pays for a table of all pairs."""


class _Float8:
    """Sign, exponent, mantissa."""

    def __init__(self, layout: Minifloat) -> None:
        self.layout = layout
        self.code = layout.code

    @cached_property
    def table(self) -> NDArray[np.float32]:
        return self.layout.table()

    @cached_property
    def pairs(self) -> NDArray[np.uint64]:
        """The bits of the two numbers that each pair of codes stands for."""
        codes = np.arange(1 << 16, dtype="<u2").view(np.uint8)
        return self.table[codes].view(np.uint64)

    @np.errstate(invalid="ignore")
    def decode_into(self, codes: Codes, out: Array, scratch: Scratch) -> None:
        if codes.size < MANY or not codes.flags.c_contiguous or not out.flags.c_contiguous:
            _look_up(self.table, codes, out, scratch)
            return
        single = out if out.dtype == np.float32 else scratch.array("single", out.shape, "<f4")
        flat, found = codes.reshape(-1), single.reshape(-1)
        even = flat.size // 2 * 2
        self.pairs.take(flat[:even].view("<u2"), out=found[:even].view(np.uint64), mode="clip")
        if even < flat.size:
            found[even] = self.table[flat[even]]
        if single is not out:
            np.copyto(out, single)

    def encode_into(self, values: Array, out: Codes, scratch: Scratch) -> bool:
        return self.layout.encode_into(values, out, scratch)


class _Exponent8:
    """E8M0: a power of two, the exponent of a float32 alone; no sign, no zero, no infinity."""

    code: Final = np.dtype("u1")

    @cached_property
    def table(self) -> NDArray[np.float32]:
        values = np.ldexp(1.0, np.arange(256) - 127)
        values[255] = np.nan
        return values.astype(np.float32)

    def decode_into(self, codes: Codes, out: Array, scratch: Scratch) -> None:
        _look_up(self.table, codes, out, scratch)

    def encode_into(self, values: Array, out: Codes, scratch: Scratch) -> bool:
        """Round the magnitude in its binade; halfway is up, but down below the smallest."""
        single = values if values.dtype == np.float32 else rounded_to_odd(values.astype("f8"))
        bits = single.view(np.uint32) & np.uint32(0x7FFFFFFF)
        exponent = bits >> np.uint32(23)
        rest = bits & np.uint32(0x7FFFFF)
        is_up = (rest > 0x400000) | ((rest == 0x400000) & (exponent > 0))
        np.copyto(out, exponent + (is_up & (exponent < 255)), casting="unsafe")
        return not values.size or bool(out.max() < 255)


@np.errstate(invalid="ignore")
def _look_up(table: NDArray[np.float32], codes: Codes, out: Array, scratch: Scratch) -> None:
    single = out if out.dtype == np.float32 else scratch.array("single", out.shape, "<f4")
    table.take(codes, out=single, mode="clip")
    if single is not out:
        np.copyto(out, single)


NUMBERS: Final[dict[str, Number]] = {
    "F8_E4M3": _Float8(Minifloat(8, 3, bias=7, largest=0x7E, overflow=0x7E, nan=0x7F)),
    "F8_E5M2": _Float8(Minifloat(8, 2, bias=15, largest=0x7B, overflow=0x7C, nan=0x7F)),
    "F8_E4M3FNUZ": _Float8(
        Minifloat(8, 3, bias=8, largest=0x7F, overflow=0x80, nan=0x80, is_signed=False)
    ),
    "F8_E5M2FNUZ": _Float8(
        Minifloat(8, 2, bias=16, largest=0x7F, overflow=0x80, nan=0x80, is_signed=False)
    ),
    "F8_E8M0": _Exponent8(),
}
