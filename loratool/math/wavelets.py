"""What one coefficient of a wavelet transform becomes, for Daubechies' wavelets."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from loratool.math.namespace import Array, array_namespace, beside

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["daubechies", "entry_factors", "wavelet_factors"]


@cache
def daubechies(order: int) -> NDArray[np.float64]:
    """Return the filter of Daubechies' wavelet with so many vanishing moments, ``(2 · order,)``.

    Its polynomial has that many zeros at -1; the others are those of
    ``Σ C(order - 1 + k, k) yᵏ`` with ``y = (2 - z - 1/z) / 4`` that lie inside the unit circle.
    """
    rising = [float(math.comb(order - 1 + k, k)) for k in range(order)]
    falling = np.array(rising[::-1])
    found = np.roots(falling)
    for _ in range(4):  # Newton's steps, for roots are only found as well as they are apart
        found = found - np.polyval(falling, found) / np.polyval(np.polyder(falling), found)
    whole: NDArray[Any] = np.ones(1, complex)
    for y in found:
        pair = np.roots([1, 4 * y - 2, 1])
        whole = np.convolve(whole, [1, -pair[np.argmin(abs(pair))]])
    for _ in range(order):
        whole = np.convolve(whole, [1, 1])
    real: NDArray[np.float64] = np.array(whole.real, np.float64)
    real *= math.sqrt(2) / real.sum()
    return real


def wavelet_factors(
    values: Array, places: tuple[NDArray[np.int64], ...], out: int, into: int, order: int
) -> tuple[Array, Array]:
    """Return B and A of one step of the inverse transform of a few coefficients, as PEFT lays it.

    The coefficients lie in a matrix with a margin; its quarters are those of smooth and of rough
    rows and columns. Each coefficient adds an outer product of two filters.

    Args:
        values: ``(n,)``.
        places: Rows and columns of the coefficients without the margin, ``(n,)`` each.
        out: Rows of the result.
        into: Columns of the result.
        order: Of Daubechies' wavelet.
    """
    smooth = daubechies(order)
    rough = smooth[::-1] * (-1.0) ** np.arange(len(smooth))
    margin = len(smooth) - 2
    sides = [size + margin + (size + margin) % 2 for size in (out, into)]
    offsets = [(side - size) // 2 for side, size in zip(sides, (out, into), strict=True)]
    rows, columns = (each + first for each, first in zip(places, offsets, strict=True))
    is_low, is_right = rows >= sides[0] // 2, columns >= sides[1] // 2
    # What is right of the middle has rough rows, what is below it rough columns.
    up = _filtered(rows % (sides[0] // 2), is_right, (smooth, rough), sides[0], out)
    down = _filtered(columns % (sides[1] // 2), is_low, (smooth, rough), sides[1], into)
    return beside(up, values) * values, beside(np.ascontiguousarray(down.T), values)


def _filtered(
    places: NDArray[Any], is_rough: NDArray[Any], filters: tuple[Any, Any], side: int, size: int
) -> NDArray[np.float64]:
    """Return a column for each coefficient: its filter at its place, as much as is inside."""
    length = len(filters[0])
    cut = (2 * length - 3) // 2
    left = side - 2 + length - 2 * cut  # of the transform, before its middle is taken
    first = cut + (left - size) // 2
    which = np.where(is_rough[:, None], filters[1], filters[0])
    whole = np.zeros((size, len(places)))
    for tap in range(length):
        targets = 2 * places + tap - first
        inside = (targets >= 0) & (targets < size)
        whole[targets[inside], np.flatnonzero(inside)] += which[inside, tap]
    return whole


def entry_factors(
    values: Array, places: tuple[NDArray[np.int64], ...], out: int, into: int
) -> tuple[Array, Array]:
    """Return B and A of a matrix with a few entries; the arguments are as above."""
    xp = array_namespace(values)
    count = len(places[0])
    up, down = np.zeros((out, count)), np.zeros((count, into))
    up[places[0], np.arange(count)] = 1.0
    down[np.arange(count), places[1]] = 1.0
    return beside(up, values) * xp.reshape(values, (1, -1)), beside(down, values)
