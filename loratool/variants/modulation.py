"""Differences of the vectors that modulate a block (``diff_m`` of Wan's distillations)."""

from __future__ import annotations

from types import MappingProxyType

from loratool.adapter.parameters import WholeParameters
from loratool.adapter.slots import Slot

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["diff_m"],
    "suffixes": {".diff_m": "diff_m"},
    "priority": 6,
}


class Modulation(WholeParameters):
    """What is added to a block's own parameter, which diffusers calls ``scale_shift_table``."""

    name = "modulation"
    words = "the difference of a block's modulation"
    has_matrix = False
    parameters = MappingProxyType({Slot("diff_m"): ("modulation", "scale_shift_table")})


VARIANT = Modulation()
