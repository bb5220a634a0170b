"""The types of 256 weights, with scales of a few bits for 16 or 32 of them: Q2_K to Q6_K."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.ggml.pieces import are_finite, nibbles, scale, scaled

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DECODERS"]


def q2_k(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``d·s·q − dmin·m`` for 16 weights each: s in the low nibble of a byte, m in the high one."""
    d, dmin = scale(blocks, 80, out.dtype), scale(blocks, 82, out.dtype)
    pairs = blocks[:, :16]
    _with_minima(_two_bits(blocks, 16), d * (pairs & 15), dmin * (pairs >> 4), out)
    return are_finite(d, dmin)


def q3_k(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``d·(s − 32)·(q − 4)``: the third bit of each q apart, s of six bits in 12 bytes."""
    d = scale(blocks, 108, out.dtype)
    codes = _two_bits(blocks, 32)
    high = codes.reshape(-1, 8, 32)
    for bit in range(8):
        high[:, bit] |= (blocks[:, :32] >> bit & 1) << 2
    signed = codes.view(np.int8)
    signed -= 4
    low, top = blocks[:, 96:104], blocks[:, 104:108]
    scales = np.empty((len(blocks), 4, 4), np.uint8)
    nibbles(low, scales.reshape(-1, 2, 8))
    for part in range(4):
        scales[:, part] |= (top >> 2 * part & 3) << 4
    six = scales.reshape(-1, 16).view(np.int8)
    six -= 32
    scaled(signed, d * six, out)
    return are_finite(d)


def q4_k(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``d·s·q − dmin·m`` for 32 weights each."""
    d, dmin = scale(blocks, 0, out.dtype), scale(blocks, 2, out.dtype)
    scales, minima = _six_bits(blocks[:, 4:16])
    _with_minima(_four_bits(blocks, 16), d * scales, dmin * minima, out)
    return are_finite(d, dmin)


def q5_k(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``d·s·q − dmin·m`` for 32 weights each, the fifth bits of all weights apart."""
    d, dmin = scale(blocks, 0, out.dtype), scale(blocks, 2, out.dtype)
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = _four_bits(blocks, 48)
    high = codes.reshape(-1, 8, 32)
    for bit in range(8):
        high[:, bit] |= (blocks[:, 16:48] >> bit & 1) << 4
    _with_minima(codes, d * scales, dmin * minima, out)
    return are_finite(d, dmin)


def q6_k(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``d·s·(q − 32)`` for 16 weights each, two bits of each weight apart, s a signed byte."""
    d = scale(blocks, 208, out.dtype)
    # Of 128 weights the low nibbles of 64 bytes come first, then the high ones.
    codes = np.empty((len(blocks), 2, 2, 64), np.uint8)
    nibbles(blocks[:, :128].reshape(-1, 2, 64), codes)
    top = blocks[:, 128:192].reshape(-1, 2, 32)
    quarters = codes.reshape(-1, 2, 4, 32)
    for part in range(4):
        quarters[:, :, part] |= (top >> 2 * part & 3) << 4
    signed = codes.reshape(-1, 256).view(np.int8)
    signed -= 32
    scaled(signed, d * blocks[:, 192:208].view(np.int8), out)
    return are_finite(d)


def _two_bits(blocks: NDArray[np.uint8], at: int) -> NDArray[np.uint8]:
    """Return the 256 codes in 64 bytes: of 128 weights those of the lowest bits come first."""
    codes = np.empty((len(blocks), 2, 4, 32), np.uint8)
    packed = blocks[:, at : at + 64].reshape(-1, 2, 32)
    for part in range(4):
        np.right_shift(packed, 2 * part, out=codes[:, :, part])
    np.bitwise_and(codes, 3, out=codes)
    return codes.reshape(-1, 256)


def _four_bits(blocks: NDArray[np.uint8], at: int) -> NDArray[np.uint8]:
    """Return the 256 codes in 128 bytes: of 64 weights the low nibbles come first."""
    codes = np.empty((len(blocks), 4, 2, 32), np.uint8)
    nibbles(blocks[:, at : at + 128].reshape(-1, 4, 32), codes)
    return codes.reshape(-1, 256)


def _six_bits(packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the eight scales and the eight minima in twelve bytes.

    The first four of both are whole, with two bits of the other four on top of them.
    """
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, rest & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, rest >> 4 | second >> 6 << 4], axis=1)
    return scales, minima


def _with_minima(
    codes: NDArray[np.uint8], scales: NDArray[Any], minima: NDArray[Any], out: NDArray[Any]
) -> None:
    grouped = scaled(codes, scales, out)
    np.subtract(grouped, minima[..., None], out=grouped)


DECODERS: Final = {"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}
