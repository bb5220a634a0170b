"""The element types by their names in a header, and small tensors decoded or encoded whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loratool.codecs.numbers import floats
from loratool.codecs.numbers.number import Array, Codes, Number
from loratool.codecs.numbers.scratch import Scratch
from loratool.files.dtypes import DTYPES

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["decode", "decode_into", "encode", "encode_into", "number"]


def number(dtype: str) -> Number:
    """Return the element type that a header calls ``dtype``.

    Raises:
        KeyError: There are no such numbers here (complex ones, or packed ones of 4 or 6 bits).
    """
    if dtype in floats.NUMBERS:
        return floats.NUMBERS[dtype]
    if dtype.startswith("F8"):
        from loratool.codecs.numbers import float8

        return float8.NUMBERS[dtype]
    from loratool.codecs.numbers import integers

    return integers.NUMBERS[dtype]


def decode_into(codes: Codes, dtype: str, out: Array, scratch: Scratch | None = None) -> None:
    """Write the numbers that ``codes`` stand for to ``out``, float32 or float64, of one shape."""
    number(dtype).decode_into(codes, out, scratch or Scratch())


def encode_into(values: Array, dtype: str, out: Codes, scratch: Scratch | None = None) -> bool:
    """Write ``values``, rounded once, to ``out``; return whether all were finite and fitted."""
    return number(dtype).encode_into(values, out, scratch or Scratch())


def decode(
    data: Any, dtype: str, shape: tuple[int, ...], kind: DTypeLike = np.float64
) -> NDArray[Any]:
    """Return the numbers in ``data``, contiguous bytes, as a new array of ``kind``.

    Args:
        data: Anything with a buffer: bytes, a memoryview, an array of codes.
        dtype: What a header calls its elements.
        shape: Of the result.
        kind: float32 or float64; the latter holds every value of every float.
    """
    if DTYPES[dtype].block is not None:
        from loratool.codecs.numbers import blocks

        return blocks.decode(data, dtype, shape, kind)
    made = number(dtype)
    out = np.empty(shape, dtype=kind)
    made.decode_into(np.frombuffer(data, made.code).reshape(shape), out, Scratch())
    return out


def encode(values: NDArray[Any], dtype: str) -> Codes:
    """Return ``values``, float32 or float64, rounded once to ``dtype``, as its codes."""
    made = number(dtype)
    values = np.ascontiguousarray(values).reshape(values.shape)
    out = np.empty(values.shape, dtype=made.code)
    made.encode_into(values, out, Scratch())
    return out
