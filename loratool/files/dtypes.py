"""The dtypes of the safetensors format, and what each is called elsewhere; blocks of GGUF.

A block is some elements with scales of their own, in so many bytes. No other format has such
types: there codes and scales are tensors of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["BLOCKS", "DTYPES", "OUTPUT_DTYPES", "SHORT_DTYPES", "Dtype", "dtype_named"]


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type.

    Attributes:
        name: Its name in a safetensors header, such as ``BF16``.
        bits: Size of one element in bits; the packed types have fewer than eight. Of a block
            those of an element's code alone.
        torch_name: The attribute of ``torch`` that is the same type, or ``None``.
        digits: Bits of the mantissa of a float, without the leading one; ``None`` if it is none.
        exponent: Of the smallest positive float that has all digits.
        block: Elements and bytes of a block, where elements come in such; they follow each other
            along the last axis.
    """

    name: str
    bits: int
    torch_name: str | None
    digits: int | None = None
    exponent: int = 0
    block: tuple[int, int] | None = None

    def size(self, elements: int) -> int:
        """Return how many bytes so many elements take; of blocks only whole ones are counted."""
        if self.block is None:
            return elements * self.bits // 8
        return elements // self.block[0] * self.block[1]

    def elements(self, size: int) -> int:
        """Return how many elements so many bytes are."""
        if self.block is None:
            return size * 8 // self.bits
        return size // self.block[1] * self.block[0]

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
        """Whether factors are stored so: a float of 8 bits or more, and no exponent alone.

        llama.cpp also has factors in its simplest blocks of 8 bits.
        """
        return (bool(self.digits) and self.bits >= 8) or self.block == (32, 34)

    @property
    def is_mergeable(self) -> bool:
        """Whether a delta can be added to it directly: a float of 16 bits or more."""
        return self.is_float and self.bits >= 16


PLAIN: Final = (
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

BLOCKS: Final = tuple(
    Dtype(name, bits, None, block=(elements, size))
    for name, bits, elements, size in (
        ("Q4_0", 4, 32, 18),
        ("Q4_1", 4, 32, 20),
        ("Q5_0", 5, 32, 22),
        ("Q5_1", 5, 32, 24),
        ("Q8_0", 8, 32, 34),
        ("Q2_K", 2, 256, 84),
        ("Q3_K", 3, 256, 110),
        ("Q4_K", 4, 256, 144),
        ("Q5_K", 5, 256, 176),
        ("Q6_K", 6, 256, 210),
        ("Q8_K", 8, 256, 292),
        ("IQ1_S", 1, 256, 50),
        ("IQ1_M", 1, 256, 56),
        ("IQ2_XXS", 2, 256, 66),
        ("IQ2_XS", 2, 256, 74),
        ("IQ2_S", 2, 256, 82),
        ("IQ3_XXS", 3, 256, 98),
        ("IQ3_S", 3, 256, 110),
        ("IQ4_NL", 4, 32, 18),
        ("IQ4_XS", 4, 256, 136),
        ("TQ1_0", 1, 256, 54),
        ("TQ2_0", 2, 256, 66),
        ("Q1_0", 1, 128, 18),
        ("MXFP4", 4, 32, 17),
        ("NVFP4", 4, 64, 36),
    )
)
"""What GGUF has beside plain numbers."""

DTYPES: Final[dict[str, Dtype]] = {dtype.name: dtype for dtype in (*PLAIN, *BLOCKS)}

OUTPUT_DTYPES: Final[dict[str, str]] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What ``--dtype`` accepts, and the name of each in a header."""
SHORT_DTYPES: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What people call them."""


def dtype_named(torch_name: str) -> Dtype | None:
    """Return the dtype that torch calls ``torch_name`` (``"bfloat16"``), or ``None``."""
    return next((dtype for dtype in DTYPES.values() if dtype.torch_name == torch_name), None)
