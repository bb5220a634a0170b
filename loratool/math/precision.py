"""How finely a dtype divides the numbers."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.math.namespace import Array, array_namespace

__all__ = ["Precision"]


@dataclass(frozen=True, slots=True)
class Precision:
    """What a floating-point dtype can tell apart.

    Attributes:
        eps: The distance of 1 from the next larger number.
        smallest: The smallest positive number that has all digits.
    """

    eps: float
    smallest: float

    @classmethod
    def of(cls, array: Array) -> Precision:
        """Return the precision of an array's own dtype.

        Values of a dtype that their library does not know, such as bfloat16 in numpy, are held
        in a wider one; their precision has to come from elsewhere.
        """
        info = array_namespace(array).finfo(array.dtype)
        return cls(float(info.eps), float(info.smallest_normal))
