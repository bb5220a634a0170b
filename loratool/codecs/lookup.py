"""Codes of a few bits as numbers: each byte, or word of some bits more, is looked up whole."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["E2M1", "look_up", "multiply_groups"]

E2M1: Final = (
    *(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    *(-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
)
"""What the codes of a float with two bits of exponent and one of mantissa stand for."""
WORDS: Final = {1: 8, 2: 8, 3: 12, 4: 8, 5: 10, 6: 12, 8: 8}
"""How many bits are looked up at once, by the bits of a code: a few whole codes."""


def look_up(
    data: NDArray[np.uint8],
    values: tuple[float, ...],
    kind: DTypeLike,
    *,
    high_first: bool = False,
) -> NDArray[Any]:
    """Return the numbers that a stream of codes stands for, a new array of one dimension.

    Args:
        data: Whole groups of bytes, the lowest bits of the stream first.
        values: What each code stands for; their number tells the bits of a code.
        kind: float32 or float64.
        high_first: The first code of a byte has its highest bits; for 1, 2 and 4 bits.
    """
    bits = len(values).bit_length() - 1
    table = _table(values, bits, high_first, np.dtype(kind).char)
    words = _words(data, WORDS[bits])
    out = np.empty((words.size, table.shape[1]), table.dtype)
    # Clipping takes no copy, and no code is out of range.
    table.take(words, axis=0, out=out, mode="clip")
    return out.reshape(-1)


@lru_cache(maxsize=32)
def _table(values: tuple[float, ...], bits: int, high_first: bool, kind: str) -> NDArray[Any]:
    word = WORDS[bits]
    codes = np.arange(1 << word)[:, None] >> np.arange(0, word, bits)
    codes &= (1 << bits) - 1
    table = np.array(values, dtype=kind)[codes[:, ::-1] if high_first else codes]
    table = np.ascontiguousarray(table)
    table.flags.writeable = False
    return table


def _words(data: NDArray[np.uint8], bits: int) -> NDArray[Any]:
    """Return a stream of bytes as words of 8, 10 or 12 bits."""
    if bits == 8:
        return data
    parts = data.reshape(-1, 5 if bits == 10 else 3).astype(np.uint16).T
    words = np.empty((parts.shape[1], 8 * len(parts) // bits), np.uint16)
    for number in range(words.shape[1]):
        first, shift = divmod(number * bits, 8)
        np.right_shift(parts[first], shift, out=words[:, number])
        words[:, number] |= parts[first + 1] << (8 - shift)
    words &= np.uint16((1 << bits) - 1)
    return words.reshape(-1)


def multiply_groups(values: NDArray[Any], factors: NDArray[Any], size: int, first: int = 0) -> None:
    """Multiply, in place, each group of ``size`` numbers by its factor.

    Args:
        values: One dimension, contiguous.
        factors: One for each group that they touch.
        size: Of a group.
        first: Where in its group the first number is.
    """
    head = min(-first % size, values.size)
    if head:
        values[:head] *= factors[0]
        factors = factors[1:]
    count = (values.size - head) // size
    end = head + count * size
    whole = values[head:end].reshape(count, size)
    whole *= factors[:count, None]
    if end < values.size:
        values[end:] *= factors[count]
