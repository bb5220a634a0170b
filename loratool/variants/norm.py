"""Differences of norms (LyCORIS' ``w_norm`` and ``b_norm``)."""

from __future__ import annotations

from types import MappingProxyType

from loratool.adapter.parameters import WholeParameters
from loratool.adapter.slots import Slot

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["w_norm", "b_norm"],
    "suffixes": {".w_norm": "w_norm", ".b_norm": "b_norm"},
    "priority": 7,
}


class Norm(WholeParameters):
    """What is added to a norm's weight and bias."""

    name = "norm"
    words = "the difference of a norm"
    has_matrix = False
    parameters = MappingProxyType({Slot("w_norm"): ("weight",), Slot("b_norm"): ("bias",)})


VARIANT = Norm()
