"""What variants have in common that add numbers to a few places of a weight."""

from __future__ import annotations

import math

from loratool.adapter.model import Site
from loratool.adapter.variant import Array, Change, Variant
from loratool.errors import AdapterError

__all__ = ["AtPlaces", "Sparse", "within"]


class AtPlaces(Change):
    """Numbers that are added to places of a weight; several at one place add up.

    Args:
        site: The module.
        rows: The output of each.
        columns: Its input, kernels flattened.
        values: The numbers.
        shape: That of the weight.

    Raises:
        AdapterError: A place is outside of the weight.
    """

    def __init__(
        self, site: Site, rows: Array, columns: Array, values: Array, shape: tuple[int, ...]
    ) -> None:
        self.places: dict[int, list[tuple[int, float]]] = {}
        sides = shape[0], math.prod(shape[1:])
        triples = zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True)
        for row, column, value in triples:
            if not (0 <= row < sides[0] and 0 <= column < sides[1]):
                raise AdapterError(
                    site.module,
                    f"has a number for the place {[int(row), int(column)]} of a weight of shape "
                    f"{list(shape)}",
                    hint="is this the base that it was trained on?",
                )
            self.places.setdefault(int(row), []).append((int(column), value))

    def changed(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        kernel = math.prod(part.shape[2:])
        flat = (part + 0).reshape((part.shape[0], -1))
        first, last = column * kernel, (column + part.shape[1]) * kernel
        for index in range(part.shape[0]):
            for place, value in self.places.get(row + index, ()):
                if first <= place < last:
                    flat[index, place - first] += value
        return flat.reshape(part.shape)


def within(site: Site, places: Array, size: int) -> None:
    """Make sure that places are some of so many.

    Raises:
        AdapterError: One of them is outside.
    """
    lowest, highest = int(places.min()), int(places.max())
    if lowest < 0 or highest >= size:
        raise AdapterError(
            site.module, f"means entries {lowest} to {highest} of what has {size} of them"
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
