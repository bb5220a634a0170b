"""How far two blocks of numbers are from being the same."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["differing"]

RELATIVE_NOISE = 2.0**-22
"""Of the largest value in a block: what float32 sums in another order may differ by."""


def differing(
    expected: Tensor, actual: Tensor, before: Tensor | None = None
) -> tuple[int, int, float]:
    """Compare two tensors of one dtype and shape.

    Two values are close if they are at most one representable number apart, give or take the
    noise of float32 sums. NaN is the same as NaN.

    Args:
        expected: What should be there.
        actual: What is there.
        before: The values that a change was added to; some tools round the change itself to
            the output's dtype before they add it, which costs half a unit in its last place.

    Returns:
        How many elements differ at all, how many by more than rounding, and the largest
        difference.
    """
    if not expected.dtype.is_floating_point:
        count = int((expected != actual).sum())
        return count, count, float(count > 0)
    wanted, found = expected.double(), actual.double()
    same = (wanted == found) | (wanted.isnan() & found.isnan())
    difference = (wanted - found).abs_()
    difference[same] = 0.0
    finite = wanted.isfinite()
    largest_value = float(wanted[finite].abs().max()) if bool(finite.any()) else 0.0
    spacing = torch.finfo(expected.dtype).eps * wanted.abs().clamp_(
        min=torch.finfo(expected.dtype).tiny
    )
    if before is not None:
        spacing += torch.finfo(expected.dtype).eps * (wanted - before.double()).abs()
    is_finite = finite & found.isfinite()
    far = ~same & ~(is_finite & (difference <= spacing + RELATIVE_NOISE * largest_value))
    return int((~same).sum()), int(far.sum()), float(difference.nan_to_num(nan=torch.inf).max())
