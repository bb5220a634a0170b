"""What a stored element type can do: become float32 or float64, and come out of them.

Numbers are rounded once, to the nearest and ties to even, from float64 as from float32. What is
too large becomes what PyTorch makes of it.
"""

from __future__ import annotations

from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loratool.codecs.numbers.scratch import Scratch

__all__ = ["LARGE", "Array", "Codes", "Number", "are_finite", "are_surely_below", "rounded_to_odd"]

LARGE: Final = 1e19
"""Its square is a float32, which a sum of squares may not leave."""
Array: TypeAlias = "NDArray[np.float32] | NDArray[np.float64]"
Codes: TypeAlias = NDArray[Any]


class Number(Protocol):
    """One element type.

    Attributes:
        code: The numpy dtype of its elements as they are stored: themselves, or their bits.
    """

    @property
    def code(self) -> np.dtype[Any]: ...

    def decode_into(self, codes: Codes, out: Array, scratch: Scratch) -> None:
        """Write the numbers that ``codes`` stand for to ``out``, of the same shape."""
        ...

    def encode_into(self, values: Array, out: Codes, scratch: Scratch) -> bool:
        """Write ``values``, rounded once, to ``out``; both contiguous and of one shape.

        Returns:
            Whether all of them were finite, and none too large.
        """
        ...


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def are_surely_below(values: Array, limit: float) -> bool:
    """Whether the sum of squares, which takes one quick pass, proves all to be smaller.

    Of contiguous values; NaN proves nothing, nor do many values that are each small enough.
    """
    flat = values.reshape(-1)
    return bool(flat.dot(flat) < 0.999 * limit * limit)


def are_finite(values: Array) -> bool:
    """Whether no value is NaN or infinite."""
    if not values.size or are_surely_below(values, LARGE):
        return True
    return bool(values.max() < np.inf) and bool(values.min() > -np.inf)


def rounded_to_odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return float32 values that round on to any narrower type as ``values`` themselves would.

    What float32 does not hold goes to the neighbour with an odd last bit, which no tie of a
    type with at most 22 bits of mantissa has (Boldo and Melquiond, 2008).
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        single = values.astype(np.float32)
    bits = single.view(np.int32)
    back = single.astype(np.float64)
    is_even = (bits & 1 == 0) & (back != values) & ~np.isnan(values)
    away = np.abs(back) > np.abs(values)
    bits += np.where(is_even, np.where(away, np.int32(-1), np.int32(1)), np.int32(0))
    return single
