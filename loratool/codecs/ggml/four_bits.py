"""Codes of four bits that are looked up: IQ4_NL, IQ4_XS, MXFP4, NVFP4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.ggml.pieces import are_finite, halves, nibbles, scale, scaled
from loratool.codecs.numbers import decode

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DECODERS"]

UNEVEN: Final = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)
"""What the codes of IQ4 stand for."""
E2M1: Final = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice what the codes of FP4 stand for."""


def iq4_nl(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``d·table[q]``."""
    d = scale(blocks, 0, out.dtype)
    scaled(UNEVEN.take(halves(blocks, 2, 16), mode="clip"), d, out)
    return are_finite(d)


def iq4_xs(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``d·(s − 32)·table[q]`` for 32 weights each: two bits of each s apart."""
    d = scale(blocks, 0, out.dtype)
    scales = np.empty((len(blocks), 4, 2), np.uint8)
    nibbles(blocks[:, 4:8, None], scales[..., None])
    top = np.ascontiguousarray(blocks[:, 2:4]).view("<u2")
    eight = scales.reshape(-1, 8)
    eight |= ((top >> np.arange(0, 16, 2, dtype=np.uint16) & 3) << 4).astype(np.uint8)
    signed = eight.view(np.int8)
    signed -= 32
    codes = np.empty((len(blocks), 8, 2, 16), np.uint8)
    nibbles(blocks[:, 8:].reshape(-1, 8, 16), codes)
    scaled(UNEVEN.take(codes.reshape(-1, 256), mode="clip"), d * signed, out)
    return are_finite(d)


def mxfp4(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``2^(e − 127)·FP4[q]``."""
    exponents = np.ascontiguousarray(blocks[:, :1])
    d = decode(exponents, "F8_E8M0", exponents.shape, out.dtype)
    d *= 0.5
    scaled(E2M1.take(halves(blocks, 1, 16), mode="clip"), d, out)
    return are_finite(d)


def nvfp4(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
    """``s·FP4[q]`` for 16 weights each: s an E4M3 without a sign, whose NaN is zero."""
    magnitudes = blocks[:, :4].copy()
    magnitudes[magnitudes == 0x7F] = 0
    d = decode(magnitudes, "F8_E4M3", magnitudes.shape, out.dtype)
    d *= 0.5
    codes = np.empty((len(blocks), 4, 2, 8), np.uint8)
    nibbles(blocks[:, 4:].reshape(-1, 4, 8), codes)
    scaled(E2M1.take(codes.reshape(-1, 64), mode="clip"), d, out)
    return bool((magnitudes < 0x80).all())


DECODERS: Final = {"IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs, "MXFP4": mxfp4, "NVFP4": nvfp4}
