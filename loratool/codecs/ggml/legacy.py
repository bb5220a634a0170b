"""The types of 32 weights with one scale, and perhaps one minimum: Q4_0 to Q8_0, and Q8_K."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.ggml.pieces import are_finite, halves, scale, scaled

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DECODERS"]


def q8_0(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``d·q``: a scale, then signed bytes."""
    d = scale(blocks, 0, out.dtype)
    scaled(blocks[:, 2:].view(np.int8), d, out)
    return are_finite(d)


def q8_k(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``d·q``: a scale of 32 bits, 256 signed bytes, and sums of them that nobody needs here."""
    d = np.ascontiguousarray(blocks[:, :4]).view("<f4").astype(out.dtype)
    scaled(blocks[:, 4:260].view(np.int8), d, out)
    return are_finite(d)


def q4_0(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``d·(q − 8)``."""
    d = scale(blocks, 0, out.dtype)
    codes = halves(blocks, 2, 16).view(np.int8)
    codes -= 8
    scaled(codes, d, out)
    return are_finite(d)


def q4_1(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``d·q + m``."""
    d, m = scale(blocks, 0, out.dtype), scale(blocks, 2, out.dtype)
    scaled(halves(blocks, 4, 16), d, out)
    np.add(out, m, out=out)
    return are_finite(d, m)


def q5_0(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``d·(q − 16)``, the fifth bits of all weights apart."""
    d = scale(blocks, 0, out.dtype)
    codes = _five_bits(blocks, 2).view(np.int8)
    codes -= 16
    scaled(codes, d, out)
    return are_finite(d)


def q5_1(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``d·q + m``, the fifth bits of all weights apart."""
    d, m = scale(blocks, 0, out.dtype), scale(blocks, 2, out.dtype)
    scaled(_five_bits(blocks, 4), d, out)
    np.add(out, m, out=out)
    return are_finite(d, m)


def _five_bits(blocks: NDArray[np.uint8], at: int) -> NDArray[np.uint8]:
    codes = halves(blocks, at + 4, 16)
    bits = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    np.left_shift(bits, 4, out=bits)
    return np.bitwise_or(codes, bits, out=codes)


DECODERS: Final = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q8_K": q8_k,
}
