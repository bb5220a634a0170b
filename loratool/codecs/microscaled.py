"""MXFP4 as numbers become it: FP4 in blocks of 32 with a power of two each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.fp4 import LARGEST, in_bytes, nearest
from loratool.codecs.lookup import E2M1

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BLOCK", "STEP", "encode_into"]

BLOCK: Final = 32
BIAS: Final = 127
FINEST: Final = 2
"""Between the exponent of a block's largest number and that of its scale: that of 4, in FP4."""
STEP: Final = 1 << 19
"""Numbers that are decoded or encoded at a time."""


def encode_into(values: NDArray[Any], packed: NDArray[np.uint8], powers: NDArray[np.uint8]) -> None:
    """Write codes and scales of a matrix, some rows at a time."""
    count = max(1, STEP // max(1, values.shape[1]))
    for row in range(0, len(values), count):
        rows = slice(row, row + count)
        codes, powers[rows] = _encode(values[rows])
        packed[rows] = codes.reshape(packed[rows].shape)


def _encode(values: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return codes ``(rows, blocks, 16)`` and scales ``(rows, blocks)`` of some rows."""
    blocks = np.ascontiguousarray(values).reshape(len(values), values.shape[1] // BLOCK, BLOCK)
    peaks = np.abs(blocks).max(axis=2).astype(np.float64)
    exponents = np.clip(np.frexp(peaks)[1] - 1 - FINEST, -BIAS, BIAS)
    # Only where the largest number is beyond the largest code may the next power be nearer.
    is_cut = (peaks > np.ldexp(LARGEST, exponents)) & (exponents < BIAS)
    codes = nearest(_scaled(blocks, exponents))
    if is_cut.any():
        cut, powers = blocks[is_cut], exponents[is_cut]
        other = nearest(_scaled(cut, powers + 1))
        is_nearer = 4 * _lost(cut, other, powers + 1) < _lost(cut, codes[is_cut], powers)
        codes[is_cut] = np.where(is_nearer[:, None], other, codes[is_cut])
        exponents[is_cut] += is_nearer
    exponents[peaks == 0] = -BIAS
    return in_bytes(codes), (exponents + BIAS).astype(np.uint8)


def _scaled(blocks: NDArray[Any], exponents: NDArray[Any]) -> NDArray[Any]:
    """Return blocks divided by powers of two, which rounds nothing that is no zero as a code."""
    scaled: NDArray[Any] = blocks * np.ldexp(blocks.dtype.type(1), -exponents)[..., None]
    return scaled


def _lost(blocks: NDArray[Any], codes: NDArray[np.uint8], exponents: NDArray[Any]) -> NDArray[Any]:
    """Return the sum of squares that rounding loses in each block, in units of its scale."""
    rest = np.array(E2M1, blocks.dtype).take(codes, mode="clip") - _scaled(blocks, exponents)
    found: NDArray[Any] = np.square(rest).sum(axis=-1)
    return found
