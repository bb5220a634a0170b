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
        is_float: Whether arithmetic on it means something (true for the 8-bit floats too).
    """

    name: str
    bits: int
    torch_name: str | None
    is_float: bool = False

    @property
    def is_mergeable(self) -> bool:
        """Whether a delta can be added to it directly: a float of 16 bits or more."""
        return self.is_float and self.bits >= 16


DTYPES: Final[dict[str, Dtype]] = {
    dtype.name: dtype
    for dtype in (
        Dtype("BOOL", 8, "bool"),
        Dtype("F4", 4, None, is_float=True),
        Dtype("F6_E2M3", 6, None, is_float=True),
        Dtype("F6_E3M2", 6, None, is_float=True),
        Dtype("U8", 8, "uint8"),
        Dtype("I8", 8, "int8"),
        Dtype("F8_E5M2", 8, "float8_e5m2", is_float=True),
        Dtype("F8_E4M3", 8, "float8_e4m3fn", is_float=True),
        Dtype("F8_E8M0", 8, "float8_e8m0fnu", is_float=True),
        Dtype("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", is_float=True),
        Dtype("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", is_float=True),
        Dtype("I16", 16, "int16"),
        Dtype("U16", 16, "uint16"),
        Dtype("F16", 16, "float16", is_float=True),
        Dtype("BF16", 16, "bfloat16", is_float=True),
        Dtype("I32", 32, "int32"),
        Dtype("U32", 32, "uint32"),
        Dtype("F32", 32, "float32", is_float=True),
        Dtype("C64", 64, "complex64"),
        Dtype("F64", 64, "float64", is_float=True),
        Dtype("I64", 64, "int64"),
        Dtype("U64", 64, "uint64"),
    )
}

OUTPUT_DTYPES: Final[dict[str, str]] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What ``--dtype`` accepts, and the name of each in a header."""


def dtype_named(torch_name: str) -> Dtype | None:
    """Return the dtype that torch calls ``torch_name`` (``"bfloat16"``), or ``None``."""
    return next((dtype for dtype in DTYPES.values() if dtype.torch_name == torch_name), None)
