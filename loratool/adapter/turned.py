"""What variants have in common that turn the inputs of a weight."""

from __future__ import annotations

import math
from collections.abc import Callable

from loratool.adapter.model import Site
from loratool.adapter.variant import Array, Change, Variant

__all__ = ["Rowwise", "Turned"]


class Rowwise(Change):
    """What becomes of each row of a weight, its kernel flattened into the columns."""

    grain = (1, 0)

    def __init__(self, function: Callable[[Array, int], Array]) -> None:
        self.function = function

    def changed(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        flat = part.reshape((part.shape[0], math.prod(part.shape[1:])))
        return self.function(flat, row).reshape(part.shape)


class Turned(Variant):
    """``W R``; a part of it is not one, and no scale multiplies it."""

    is_scaled = False
    needs_base = True
    has_change = True
    takes_weights = False
    kernel_slots = frozenset()

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return 1
