"""What blocks of all types are made of: scales of 16 bits, and nibbles in two halves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loratool.codecs.numbers import decode

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["are_finite", "halves", "nibbles", "scale", "scaled"]


def scale(blocks: NDArray[np.uint8], at: int, kind: DTypeLike) -> NDArray[Any]:
    """Return the float16 number at byte ``at`` of each block, ``(n, 1)``."""
    raw = np.ascontiguousarray(blocks[:, at : at + 2])
    return decode(raw, "F16", (len(blocks), 1), kind)


def are_finite(*scales: NDArray[Any]) -> bool:
    """Whether no scale is NaN or infinite."""
    return all(bool(np.isfinite(each).all()) for each in scales)


def nibbles(packed: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Write the low nibbles of ``(…, n)`` bytes, then the high ones, to ``(…, 2, n)``."""
    np.bitwise_and(packed, 15, out=out[..., 0, :])
    np.right_shift(packed, 4, out=out[..., 1, :])


def halves(blocks: NDArray[np.uint8], at: int, count: int) -> NDArray[np.uint8]:
    """Return the nibbles of ``count`` bytes of each block from ``at`` on, ``(n, 2 * count)``.

    The low ones come first.
    """
    codes = np.empty((len(blocks), 2, count), np.uint8)
    nibbles(blocks[:, at : at + count], codes)
    return codes.reshape(len(blocks), 2 * count)


def scaled(codes: NDArray[Any], scales: NDArray[Any], out: NDArray[Any]) -> NDArray[Any]:
    """Write codes, each ``n`` of which share one of the ``n`` scales, multiplied by it.

    Args:
        codes: ``(blocks, weights)``.
        scales: ``(blocks, groups)``.
        out: ``(blocks, weights)``, contiguous.

    Returns:
        ``out`` as ``(blocks, groups, weights of a group)``.
    """
    np.copyto(out, codes)
    grouped: NDArray[Any] = out.reshape(*scales.shape, -1)
    np.multiply(grouped, scales[..., None], out=grouped)
    return grouped
