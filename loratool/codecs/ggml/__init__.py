"""Blocks of GGUF made numbers, by the formulas of each type.

A block holds some weights that follow each other in a row: their codes, and the scales that they
share. All types have 16-bit scales, most of them with smaller ones inside that scale fewer weights
each; what a code is multiplied by is exact in float32, and so is the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from loratool.codecs.ggml import four_bits, k_quants, legacy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DECODERS", "Decoder"]

Decoder: TypeAlias = "Callable[[NDArray[np.uint8], NDArray[Any]], bool]"
"""Writes the numbers of blocks ``(n, bytes)`` to ``(n, weights)``; whether scales are finite."""

DECODERS: Final[dict[str, Decoder]] = {
    **legacy.DECODERS,
    **k_quants.DECODERS,
    **four_bits.DECODERS,
}
"""By the names of the types."""
