"""The dtypes of the safetensors format, and what each is called elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["DTYPES", "OUTPUT_DTYPES", "Dtype", "dtype_named"]


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type.

    Attributes:
        name: Its name in a safetensors header, such as ``BF16``.
        bits: Size of one element in bits; the packed types have fewer than eight.
        torch_name: The attribute of ``torch`` that is the same type, or ``None``.
        digits: Bits of the mantissa of a float, without the leading one; ``None`` if it is none.
        exponent: Of the smallest positive float that has all digits.
    """

    name: str
    bits: int
    torch_name: str | None
    digits: int | None = None
    exponent: int = 0

    @property
    def is_float(self) -> bool:
        """Whether arithmetic on it means something (true for the 8-bit floats too)."""
        return self.digits is not None

    @property
    def eps(self) -> float:
        """The distance of 1 from the next larger float."""
        assert self.digits is not None
        return 2.0**-self.digits

    @property
    def smallest(self) -> float:
        """The smallest positive float that has all digits."""
        return 2.0**self.exponent

    @property
    def is_factor(self) -> bool:
        """Whether factors are stored so: a float of 8 bits or more, and no exponent alone."""
        return bool(self.digits) and self.bits >= 8

    @property
    def is_mergeable(self) -> bool:
        """Whether a delta can be added to it directly: a float of 16 bits or more."""
        return self.is_float and self.bits >= 16


DTYPES: Final[dict[str, Dtype]] = {
    dtype.name: dtype
    for dtype in (
        Dtype("BOOL", 8, "bool"),
        Dtype("F4", 4, None, 1, 0),
        Dtype("F6_E2M3", 6, None, 3, 0),
        Dtype("F6_E3M2", 6, None, 2, -2),
        Dtype("U8", 8, "uint8"),
        Dtype("I8", 8, "int8"),
        Dtype("F8_E5M2", 8, "float8_e5m2", 2, -14),
        Dtype("F8_E4M3", 8, "float8_e4m3fn", 3, -6),
        Dtype("F8_E8M0", 8, "float8_e8m0fnu", 0, -127),
        Dtype("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", 3, -7),
        Dtype("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", 2, -15),
        Dtype("I16", 16, "int16"),
        Dtype("U16", 16, "uint16"),
        Dtype("F16", 16, "float16", 10, -14),
        Dtype("BF16", 16, "bfloat16", 7, -126),
        Dtype("I32", 32, "int32"),
        Dtype("U32", 32, "uint32"),
        Dtype("F32", 32, "float32", 23, -126),
        Dtype("C64", 64, "complex64"),
        Dtype("F64", 64, "float64", 52, -1022),
        Dtype("I64", 64, "int64"),
        Dtype("U64", 64, "uint64"),
    )
}

OUTPUT_DTYPES: Final[dict[str, str]] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What ``--dtype`` accepts, and the name of each in a header."""


def dtype_named(torch_name: str) -> Dtype | None:
    """Return the dtype that torch calls ``torch_name`` (``"bfloat16"``), or ``None``."""
    return next((dtype for dtype in DTYPES.values() if dtype.torch_name == torch_name), None)
