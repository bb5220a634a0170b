"""Codes of a few bits, packed densely into words, lowest bits first; and groups that share scales.

A row of words, read as little-endian bytes, is one stream of bits, whatever the words' size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Parts
from loratool.errors import FileFormatError
from loratool.files.spec import StoredTensor

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = [
    "INDICES",
    "WORD",
    "group_index",
    "scale_groups",
    "turned_words",
    "unpack",
    "words_for",
]

WORD: Final = 32
INDICES: Final = {"I32": "<i4", "I64": "<i8"}


def words_for(count: int, bits: int) -> int:
    """Return how many words hold ``count`` codes."""
    return -(-count * bits // WORD)


def unpack(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Return the codes in rows of bytes.

    Args:
        data: ``(rows, bytes)``, with at least the bytes that the codes need.
        bits: Of a code, 1 to 8.
        count: Codes of a row.

    Returns:
        ``(rows, count)``, which may be part of a larger array.
    """
    rows = data.shape[0]
    if bits == 8:
        return data[:, :count]
    data = data[:, : -(-count * bits // 8)]
    if bits == 4:
        # Both nibbles of a byte go into the two bytes of a wider number.
        wide = data.astype("<u2")
        wide |= wide << 4
        wide &= 0x0F0F
        return wide.view(np.uint8)[:, :count]
    # Eight codes fill ``bits`` bytes; a code lies in one of these, or in two neighbours.
    runs = -(-count // 8)
    if data.shape[1] < runs * bits:
        data = np.pad(data, ((0, 0), (0, runs * bits - data.shape[1])))
    data = np.ascontiguousarray(data).reshape(rows, runs, bits)
    codes = np.empty((rows, runs, 8), np.uint8)
    mask = np.uint8((1 << bits) - 1)
    for number in range(8):
        byte, shift = divmod(number * bits, 8)
        code = data[:, :, byte] >> np.uint8(shift)
        if shift + bits > 8:
            code |= data[:, :, byte + 1] << np.uint8(8 - shift)
        np.bitwise_and(code, mask, out=codes[:, :, number])
    return codes.reshape(rows, runs * 8)[:, :count]


def turned_words(parts: Parts, part: StoredTensor, start: int, stop: int) -> NDArray[np.uint8]:
    """Return columns of a matrix of words as rows of bytes, ``(stop - start, 4 · rows)``."""
    words = np.frombuffer(parts.columns(part, start, stop), "<u4")
    turned = np.ascontiguousarray(words.reshape(part.spec.shape[0], stop - start).T)
    return turned.view(np.uint8).reshape(stop - start, 4 * part.spec.shape[0])


def group_index(
    parts: Parts, part: StoredTensor, groups: int, size: int
) -> NDArray[np.int64] | None:
    """Return which group each input is in; ``None`` where they are runs of ``size``.

    Raises:
        FileFormatError: There is no such group.
    """
    (count,) = part.spec.shape
    index = np.frombuffer(parts.rows(part, 0, count), INDICES[part.spec.dtype]).astype(np.int64)
    if count and (index == -1).all():
        return None  # what older releases of compressed-tensors left where nothing was reordered
    if count and (index.min() < 0 or index.max() >= groups):
        wrong = index.min() if index.min() < 0 else index.max()
        raise FileFormatError(
            part.spec.name, f"names group {wrong}, expected 0 to {groups - 1}: it has {groups}"
        )
    return None if np.array_equal(index, np.arange(count) // max(1, size)) else index


def scale_groups(
    codes: NDArray[Any],
    zeros: NDArray[Any] | float,
    factors: NDArray[Any],
    groups: int | NDArray[np.int64],
    kind: DTypeLike,
) -> NDArray[Any]:
    """Return ``(codes - zeros) · factors``, both given for each group of columns.

    Args:
        codes: ``(rows, columns)``, whole numbers.
        zeros: ``(rows, groups)``, or one for all.
        factors: ``(rows, groups)``.
        groups: How many columns a group has, the last one perhaps fewer; or the group of each.
        kind: Of the result.
    """
    values = codes.astype(kind)
    if not isinstance(groups, int):
        values -= zeros.take(groups, axis=1) if isinstance(zeros, np.ndarray) else zeros
        values *= factors.take(groups, axis=1)
        return values
    rows, columns = values.shape
    whole = columns // groups if groups else 0
    for first, count, size in ((0, whole, groups), (whole, 1, columns - whole * groups)):
        if not count * size:
            continue
        cut = values[:, first * groups : first * groups + count * size]
        # Splitting an axis never copies.
        view = cut.reshape(rows, count, size)
        last = first + count
        if isinstance(zeros, np.ndarray):
            view -= zeros[:, first:last, None]
        elif zeros:
            view -= zeros
        view *= factors[:, first:last, None]
    return values
