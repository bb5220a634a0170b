"""What ``init_lora_weights`` did to the base: the delta is relative to what it left there."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

__all__ = ["BaseEffect", "Initialisation", "initialisation"]


class BaseEffect(Enum):
    """What became of the base's weights when the adapter was initialised."""

    NONE = "stayed as they were"
    COMPUTABLE = "lost a part that is a function of themselves"
    UNDETERMINED = "changed in a way that no file records"
    UNKNOWN = "may have changed"


@dataclass(frozen=True, slots=True)
class Initialisation:
    """One way to initialise an adapter.

    Attributes:
        name: The value of ``init_lora_weights``, in small letters.
        effect: What it does to the base.
        words: Why no merge is right, as the end of a sentence; empty where one is.
    """

    name: str
    effect: BaseEffect
    words: str = ""

    @property
    def changes_base(self) -> bool:
        """Whether ``B @ A`` is not what training added to the base, or may not be."""
        return self.effect is not BaseEffect.NONE

    @property
    def residual(self) -> str | None:
        """The name of what has to be taken out of the base, where that can be computed."""
        return self.name if self.effect is BaseEffect.COMPUTABLE else None

    @property
    def refusal(self) -> str:
        """Why ``B @ A`` alone is no delta, for verbs that have no base."""
        if self.effect is BaseEffect.UNKNOWN:
            return f"init_lora_weights is {self.name!r}, which is not known"
        return (
            f"init_lora_weights is {self.name!r}: its delta is relative to a base that the "
            "initialisation changed"
        )


EFFECTS: Final = {
    **dict.fromkeys(("true", "false", "1", "0", "none"), BaseEffect.NONE),
    **dict.fromkeys(("gaussian", "orthogonal", "eva", "mica"), BaseEffect.NONE),
    **dict.fromkeys(("pissa", "olora"), BaseEffect.COMPUTABLE),
}
"""Whole names."""

UNDETERMINED: Final = {
    "pissa_niter": "took a randomised decomposition out of the base, which no file records",
    "corda": "took a data-dependent decomposition out of the base, which no file records",
    "lora_ga": "shifted the base by a gradient-dependent amount, which no file records",
    "loftq": "was trained on a quantised base, which is not the one on disk",
}
"""What names begin with."""


def initialisation(name: str) -> Initialisation:
    """Return what is known about a value of ``init_lora_weights``, in small letters."""
    if name in EFFECTS:
        return Initialisation(name, EFFECTS[name])
    for prefix, words in UNDETERMINED.items():
        if name.startswith(prefix):
            return Initialisation(name, BaseEffect.UNDETERMINED, f": it {words}")
    return Initialisation(name, BaseEffect.UNKNOWN, ", which is not known")
