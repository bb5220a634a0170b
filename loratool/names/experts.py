"""Mixture-of-experts weights: one tensor for each expert, or all experts fused into one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from loratool.adapter.model import FUSED_PARAMETERS

__all__ = [
    "FUSED",
    "TRANSPOSED_MODEL_TYPES",
    "FusedPart",
    "fused_part_of",
    "is_fusible_expert",
    "registration_index",
]


@dataclass(frozen=True, slots=True)
class FusedPart:
    """Which part of a fused parameter one expert's projection is.

    Attributes:
        parameter: ``gate_up_proj`` or ``down_proj``.
        index: Which of the parts along the output, counted from 0.
        parts: How many parts there are.
    """

    parameter: str
    index: int
    parts: int


EXPERT: Final = re.compile(r".+\.experts\.[0-9]{1,9}\.(?P<leaf>[^.]+)")

FUSED: Final = {
    "gate_up_proj": (("w1", "gate_proj"), ("w3", "up_proj")),
    "down_proj": (("w2", "down_proj"),),
}
"""Fused parameter to its parts in order; each part with its names in the two conventions."""

TRANSPOSED_MODEL_TYPES: Final = frozenset(("gpt_oss", "aria", "openai_privacy_filter"))
"""Models that store fused experts as ``(experts, in, out)`` and say so to PEFT."""


def fused_part_of(leaf: str) -> FusedPart | None:
    """Return which part of which fused parameter the projection called ``leaf`` is."""
    for parameter, parts in FUSED.items():
        for index, names in enumerate(parts):
            if leaf in names:
                return FusedPart(parameter, index, len(parts))
    return None


def is_fusible_expert(module: str) -> bool:
    """Whether a module is one expert's projection, which transformers 5 fuses on loading."""
    match = EXPERT.fullmatch(module)
    return match is not None and fused_part_of(match["leaf"]) is not None


def registration_index(parameter: str) -> int | None:
    """Return the place of a fused parameter in its module, as transformers registers them."""
    return FUSED_PARAMETERS.index(parameter) if parameter in FUSED_PARAMETERS else None
