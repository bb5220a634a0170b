"""Rows of a stack of matrices, counted through all of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from loratool.codecs.codec import Parts
from loratool.files.spec import StoredTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["stacked_rows"]


def stacked_rows(parts: Parts, part: StoredTensor, start: int, stop: int) -> NDArray[np.uint8]:
    """Return the bytes of rows ``start`` to ``stop`` along all axes but the last, flat."""
    shape = part.spec.shape
    if len(shape) <= 2 or start == stop:
        return np.frombuffer(parts.rows(part, start, stop) if start < stop else b"", np.uint8)
    height, width = math.prod(shape[1:-1]), shape[-1]
    pieces = []
    while start < stop:
        number, row = divmod(start, height)
        end = min(stop, (number + 1) * height)
        columns = row * width, (row + end - start) * width
        pieces.append(np.frombuffer(parts.columns(part, *columns, (number, number + 1)), np.uint8))
        start = end
    return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
