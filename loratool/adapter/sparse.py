"""What variants have in common that add numbers to a few places of a weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loratool.adapter.model import Site
from loratool.adapter.variant import Array, Change, Variant
from loratool.errors import AdapterError

if TYPE_CHECKING:
    from loratool.math.places import Places

__all__ = ["AtPlaces", "Sparse", "within"]


class AtPlaces(Change):
    """Numbers that are added to places of a weight.

    Args:
        site: The module.
        places: The numbers and where they are, kernels flattened into the columns.
        shape: That of the weight.

    Raises:
        AdapterError: A place is outside of the weight.
    """

    def __init__(self, site: Site, places: Places, shape: tuple[int, ...]) -> None:
        self.places = places
        outside = places.outside(shape[0], math.prod(shape[1:]))
        if outside is not None:
            raise AdapterError(
                site.module,
                f"has a number for the place {list(outside)} of a weight of shape {list(shape)}",
                hint="is this the base that it was trained on?",
                code="LT022",
            )

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        kernel = math.prod(part.shape[2:])
        flat = part.reshape((part.shape[0], part.shape[1] * kernel))
        return self.places.part(row, column * kernel, flat).reshape(part.shape)


def within(site: Site, places: Array, size: int) -> None:
    """Make sure that places are some of so many.

    Raises:
        AdapterError: One of them is outside.
    """
    lowest, highest = int(places.min()), int(places.max())
    if lowest < 0 or highest >= size:
        raise AdapterError(
            site.module,
            f"means entries {lowest} to {highest} of what has {size} of them",
            code="LT022",
        )


class Sparse(Variant):
    """A few numbers of a weight's shape; no plain LoRA of few ranks equals them."""

    is_scaled = False
    needs_base = True
    has_change = True
    kernel_slots = frozenset()

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return 1
