"""Two pairs of factors for one projection: for its first rows, and for its last.

Code that adapts queries and values of a fused projection of three equal parts has them so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Geometry, Read, Settings, Shapes, Variant
from loratool.errors import AdapterError

__all__ = ["VARIANT"]

CLAIM = {"signs": ["first down", "first up", "last down", "last up"], "priority": 10}

PAIRS: Final = (
    (Slot("first down"), Slot("first up")),
    (Slot("last down"), Slot("last up")),
)
PARTS: Final = 3


class OuterParts(Variant):
    """``B`` of each pair beside zeros, one above the other; between them are untouched rows."""

    name = "outer parts"
    words = "two pairs of factors, for the first and the last rows of a projection"
    has_factors = True
    is_compact = True

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        down, up = next((shapes[a], shapes[b]) for a, b in PAIRS if a in shapes and b in shapes)
        return Geometry(down[0], PARTS * up[0], down[1])

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        heights = set()
        for down, up in PAIRS:
            pair = [site.slots[slot].spec.shape for slot in (down, up) if slot in site.slots]
            if len(pair) == 1:
                yield "LT001", "has one factor of a pair without the other"
            elif pair and (any(len(s) != 2 for s in pair) or pair[0][0] != pair[1][1]):
                yield "LT003", f"has A of shape {list(pair[0])} and B of shape {list(pair[1])}"
            elif pair:
                heights.add((pair[1][0], pair[0][1]))
        if len(heights) > 1:
            yield "LT003", "has two pairs of factors of unlike sizes"

    def check(self, site: Site, shape: tuple[int, ...] | None) -> None:
        """See :class:`Variant`."""
        for _, problem in self.problems(site):
            raise AdapterError(site.label, problem)

    def factor_rank(self, site: Site) -> int:
        """See :class:`Variant`."""
        downs = (site.slots.get(down) for down, _ in PAIRS)
        return sum(stored.spec.shape[0] for stored in downs if stored is not None)

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return tuple(up for _, up in PAIRS if up in slots)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.namespace import array_namespace

        found = [
            (read(site.slots[down]), read(site.slots[up])) if down in site.slots else None
            for down, up in PAIRS
        ]
        first = next(pair for pair in found if pair is not None)
        height, xp = first[1].shape[0], array_namespace(first[0])
        rank = sum(pair[0].shape[0] for pair in found if pair is not None)
        whole = xp.zeros((PARTS * height, rank), dtype=first[1].dtype, device=first[1].device)
        done = 0
        for start, pair in zip((0, (PARTS - 1) * height), found, strict=True):
            if pair is not None:
                columns = slice(done, done + pair[0].shape[0])
                whole[start : start + height, columns] = pair[1]
                done += pair[0].shape[0]
        return xp.concat([pair[0] for pair in found if pair is not None]), whole


VARIANT = OuterParts()
