"""Stacked factors of a merged projection: loralib's ``MergedLinear`` (``enable_lora``)."""

from __future__ import annotations

from loratool.adapter.model import Site
from loratool.adapter.plain import Plain
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Read, Slots

__all__ = ["VARIANT"]

CLAIM = {"flags": ["enable_lora"], "priority": 20}


class Stacked(Plain):
    """A stacks the factors of the parts that are adapted, B those parts' rows.

    Each part of A is multiplied with its own part of B; B beside zeros for the parts that are not
    enabled is the same. In PEFT before 0.3 B is that of a grouped convolution, ``(rows, r, 1)``.
    """

    name = "stacked"
    is_compact = True
    is_stacked = True

    def fits(self, slots: Slots, enabled: tuple[bool, ...]) -> bool:
        """See :class:`Variant`."""
        if not any(enabled) or not {Slot.DOWN, Slot.UP} <= slots.keys():
            return False
        down, up = slots[Slot.DOWN].spec.shape, slots[Slot.UP].spec.shape
        parts = sum(enabled)
        is_matrix = len(down) == 2 and len(up) in (2, 3) and up[2:] in ((), (1,))
        return is_matrix and down[0] == parts * up[1] and up[0] % parts == 0

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.namespace import array_namespace

        down, up = super().factors(site, read)
        enabled = site.enabled
        rank, count = up.shape[1], sum(enabled)
        height = up.shape[0] // count
        xp = array_namespace(up)
        shape = (height * len(enabled), rank * count)
        whole = xp.zeros(shape, dtype=up.dtype, device=up.device)
        places = [place for place, is_enabled in enumerate(enabled) if is_enabled]
        for index, place in enumerate(places):
            rows = slice(place * height, (place + 1) * height)
            part = up[index * height : (index + 1) * height]
            whole[rows, index * rank : (index + 1) * rank] = part
        return down, whole


VARIANT = Stacked()
