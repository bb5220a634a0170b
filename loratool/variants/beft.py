"""BEFT: the difference of a bias, as PEFT stores it."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from loratool.adapter.parameters import WholeParameters
from loratool.adapter.slots import Slot

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["beft_bias"],
    "peft": {".beft_bias": "beft_bias"},
    "peft_types": ["BEFT"],
    "evidence": 2,
    "priority": 10,
}

ADDED: Final = Slot("beft_bias")


class Beft(WholeParameters):
    """What is added to the bias of a layer, ``(1, out)``."""

    name = "beft"
    words = "the difference of a bias"
    shapes = MappingProxyType(
        {
            "beft_bias": "1 out",
        }
    )
    has_matrix = False
    fields = frozenset(("init_weights",))
    parameters = MappingProxyType({ADDED: ("bias",)})


VARIANT = Beft()
