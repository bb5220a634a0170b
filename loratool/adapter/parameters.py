"""What variants have in common that change whole parameters, by stored tensors of their shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Geometry, Settings, Shapes, Variant
from loratool.files.dtypes import DTYPES

__all__ = ["WholeParameters"]


class WholeParameters(Variant):
    """Every tensor is added to a parameter, or takes its place, without any scale."""

    is_scaled = False

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        first = next((shapes[slot] for slot in shapes if slot in self.used), ())
        return Geometry(1, math.prod(first), 1)

    @property
    def used(self) -> frozenset[Slot]:
        """The roles of its tensors."""
        return frozenset((*self.parameters, Slot.BIAS))

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return () if self.replaces else tuple(slot for slot in self.parameters if slot in slots)

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        for slot, tensor in site.slots.items():
            if slot not in self.used and slot not in (Slot.ALPHA, Slot.STATE):
                yield (
                    "LT001",
                    f"is {self.words}, and has {tensor.spec.name!r} beside it, which would be lost",
                )
            elif slot in self.used and not DTYPES[tensor.spec.dtype].is_factor:
                yield "LT004", f"has a {slot} of dtype {tensor.spec.dtype}, expected a float"
