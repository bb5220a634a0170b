"""LN tuning (arXiv 2312.11420): modules that were trained as a whole, most often norms."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from loratool.adapter.parameters import WholeParameters
from loratool.adapter.slots import Slot

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["ln weight", "ln bias"],
    "peft": {".ln_tuning_layers.weight": "ln weight", ".ln_tuning_layers.bias": "ln bias"},
    "peft_types": ["LN_TUNING"],
    "evidence": 2,
    "priority": 10,
}

WEIGHT: Final = Slot("ln weight")
BIAS: Final = Slot("ln bias")


class LnTuning(WholeParameters):
    """What weight and bias of the module are from then on."""

    name = "ln_tuning"
    words = "a weight in place of the base's (LN tuning)"
    has_matrix = False
    replaces = True
    resizes = False
    parameters = MappingProxyType({WEIGHT: ("weight",), BIAS: ("bias",)})


VARIANT = LnTuning()
