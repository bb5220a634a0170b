"""How far two blocks of numbers are from being the same."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from loratool.math.namespace import Array, array_namespace, double
from loratool.math.precision import Precision

__all__ = ["differing"]

RELATIVE_NOISE: Final = 2.0**-22
"""Of the largest value in a block: what float32 sums in another order may differ by."""


@np.errstate(over="ignore", invalid="ignore")
def differing(
    expected: Array,
    actual: Array,
    before: Array | None = None,
    *,
    precision: Precision | None = None,
) -> tuple[int, int, float]:
    """Compare two arrays of one dtype and shape.

    Two values are close if they are at most one representable number apart, give or take the
    noise of float32 sums. NaN is the same as NaN.

    Args:
        expected: What should be there.
        actual: What is there.
        before: The values that a change was added to; some tools round the change itself to
            the output's dtype before they add it, which costs half a unit in its last place.
        precision: Of the dtype that the values are stored in; default: that of the arrays.

    Returns:
        How many elements differ at all, how many by more than rounding, and the largest
        difference.
    """
    xp = array_namespace(expected, actual, before)
    if not xp.isdtype(expected.dtype, "real floating"):
        count = int(xp.count_nonzero(expected != actual))
        return count, count, float(count > 0)
    precision = precision or Precision.of(expected)
    wanted, found = double(expected), double(actual)
    same = (wanted == found) | (xp.isnan(wanted) & xp.isnan(found))
    if bool(xp.all(same)):
        return 0, 0, 0.0
    difference = xp.where(same, 0.0, xp.abs(wanted - found))
    finite = xp.isfinite(wanted)
    largest_value = float(xp.max(xp.where(finite, xp.abs(wanted), 0.0)))
    spacing = precision.eps * xp.clip(xp.abs(wanted), min=precision.smallest)
    if before is not None:
        spacing = spacing + precision.eps * xp.abs(wanted - double(before))
    is_finite = finite & xp.isfinite(found)
    far = ~same & ~(is_finite & (difference <= spacing + RELATIVE_NOISE * largest_value))
    largest = float(xp.max(xp.where(xp.isnan(difference), math.inf, difference)))
    return int(xp.count_nonzero(~same)), int(xp.count_nonzero(far)), largest
