"""Blocks of codes with a scale in front, as llama.cpp also stores small tensors: Q8_0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.ggml.legacy import DECODERS
from loratool.errors import UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["decode"]

ELEMENTS: Final = 32
BYTES: Final = 34


def decode(data: Any, dtype: str, shape: tuple[int, ...], kind: DTypeLike) -> NDArray[Any]:
    """Return the numbers in whole blocks.

    Raises:
        UnsupportedError: They are of another type than Q8_0.
    """
    if dtype != "Q8_0":
        raise UnsupportedError(dtype, "is read in weights of a model only")
    found = np.frombuffer(data, np.uint8).reshape(-1, BYTES)
    values = np.empty((len(found), ELEMENTS), kind)
    DECODERS[dtype](found, values)
    return values.reshape(shape)
