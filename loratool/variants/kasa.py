"""KaSA (arXiv 2412.06071): ``B diag(d) A`` on a base without its smallest singular parts."""

from __future__ import annotations

from loratool.adapter.plain import Plain
from loratool.adapter.slots import Slot

__all__ = ["VARIANT"]

CLAIM = {"signs": ["diagonal"], "priority": 3}


class Kasa(Plain):
    """What it takes out of the base is a function of the base alone."""

    name = "kasa"
    words = "a kasa"
    is_linear = False
    needs_base = True
    residual = "kasa"
    between = (Slot.DIAGONAL,)
    undetermined = "is a KaSA: it also drops singular parts of the base, so its delta needs a base"


VARIANT = Kasa()
