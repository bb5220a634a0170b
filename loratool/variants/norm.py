"""Differences of norms (LyCORIS' ``w_norm`` and ``b_norm``)."""

from __future__ import annotations

import math

from loratool.adapter.variant import Geometry, Settings, Shapes, Variant

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["w_norm", "b_norm"],
    "suffixes": {".w_norm": "w_norm", ".b_norm": "b_norm"},
    "priority": 7,
}


class Norm(Variant):
    """What is added to a norm's weight and bias."""

    name = "norm"
    words = "the difference of a norm"
    is_scaled = False
    has_matrix = False

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        return Geometry(1, math.prod(next(iter(shapes.values()))), 1)


VARIANT = Norm()
