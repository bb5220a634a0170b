"""What one coefficient of a wavelet transform becomes, for Daubechies' wavelets."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from loratool.math.namespace import Array, array_namespace, beside, on_host

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["daubechies", "entry_factors", "wavelet_entries", "wavelet_factors"]


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
    (rows, up), (columns, down) = _filters(places, (out, into), order)
    one, other = _written_out(rows, up, out), _written_out(columns, down, into)
    return beside(one, values) * values, beside(np.ascontiguousarray(other.T), values)


def wavelet_entries(
    values: Array, places: tuple[NDArray[np.int64], ...], out: int, into: int, order: int
) -> tuple[NDArray[Any], ...]:
    """Return rows, columns and numbers of what the coefficients become; they add up.

    The arguments are those of :func:`wavelet_factors`.
    """
    (rows, up), (columns, down) = _filters(places, (out, into), order)
    numbers = on_host(values)[:, None, None] * up[:, :, None] * down[:, None, :]
    below = np.broadcast_to(rows[:, :, None], numbers.shape)
    right = np.broadcast_to(columns[:, None, :], numbers.shape)
    inside = (below >= 0) & (below < out) & (right >= 0) & (right < into)
    return below[inside], right[inside], numbers[inside]


def _filters(
    places: tuple[NDArray[np.int64], ...], shape: tuple[int, int], order: int
) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Return, for rows and for columns, where the taps of each coefficient's filter lie.

    Both are ``(n, taps)``: places, of which some are outside, and the taps.
    """
    smooth = daubechies(order)
    taps = len(smooth)
    rough = smooth[::-1] * (-1.0) ** np.arange(taps)
    halves = [(size + taps - 2 + 1) // 2 for size in shape]
    padded = [
        where + (2 * half - size) // 2
        for where, half, size in zip(places, halves, shape, strict=True)
    ]
    # What is right of the middle has rough rows, what is below it rough columns.
    is_rough = [where >= half for where, half in zip(padded, halves, strict=True)][::-1]
    found = []
    for where, half, size, is_high in zip(padded, halves, shape, is_rough, strict=True):
        cut = (2 * taps - 3) // 2
        whole = 2 * half - 2 + taps - 2 * cut  # of which the middle is taken
        starts = 2 * (where % half) - cut - (whole - size) // 2
        filters = np.where(is_high[:, None], rough, smooth)
        found.append((starts[:, None] + np.arange(taps), filters))
    return found


def _written_out(
    targets: NDArray[np.int64], taps: NDArray[np.float64], size: int
) -> NDArray[np.float64]:
    """Return a column for each coefficient, as much of its filter as is inside."""
    whole = np.zeros((size, len(targets)))
    inside = (targets >= 0) & (targets < size)
    which = np.broadcast_to(np.arange(len(targets))[:, None], targets.shape)
    np.add.at(whole, (targets[inside], which[inside]), taps[inside])
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
