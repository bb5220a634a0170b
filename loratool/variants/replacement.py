"""Whole weights in place of the base's (ComfyUI's ``set_weight``, of control LoRAs)."""

from __future__ import annotations

from types import MappingProxyType

from loratool.adapter.parameters import WholeParameters
from loratool.adapter.slots import Slot

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["set_weight"],
    "suffixes": {".set_weight": "set_weight"},
    "priority": 8,
}


class Replacement(WholeParameters):
    """What the parameter is from then on."""

    name = "replacement"
    words = "a weight in place of the base's (set_weight)"
    has_matrix = False
    replaces = True
    parameters = MappingProxyType({Slot("set_weight"): ("weight",)})


VARIANT = Replacement()
