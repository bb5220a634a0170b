"""The values of a module's weight, from wherever its parts lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loratool.base.place import Piece, Place
from loratool.codecs.weights import read_matrix
from loratool.files.inputs import InputFiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["read_place"]


def read_place(place: Place) -> NDArray[np.float64]:
    """Return the weight of a module in float64, exactly, in its ``stored_shape``.

    Raises:
        FileFormatError: A file has changed or cannot be read any more.
    """
    files = InputFiles({})
    try:
        parts = [_matrix(piece, files) for piece in place.pieces]
    finally:
        files.close()
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=int(place.is_transposed))
    return whole.reshape(place.stored_shape)


def _matrix(piece: Piece, files: InputFiles) -> NDArray[np.float64]:
    region = piece.region
    whole = read_matrix(piece.tensor, files).reshape(-1, region.width)
    rows = slice(region.first_row, region.first_row + region.rows)
    columns = slice(region.first_column, region.first_column + region.columns)
    part = whole[rows, columns]
    part = region.ordered(part.T).T if region.transposed else region.ordered(part)
    return np.ascontiguousarray(part)
