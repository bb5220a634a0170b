"""Microsoft's loralib: bare parameters beside the weights; alpha lives in the training code."""

from __future__ import annotations

from loratool.adapter.scheme import KeyScheme, Template
from loratool.adapter.slots import Slot

__all__ = ["SCHEME"]

SCHEME = KeyScheme(
    name="loralib",
    summary="microsoft/LoRA, bare parameters",
    example="transformer.h.0.attn.c_attn.lora_A",
    writes=True,
    foreign=("base_model.model.",),
    templates=(
        Template("{module}.lora_A", Slot.DOWN),
        Template("{module}.lora_B", Slot.UP),
        Template("{module}.alpha", Slot.ALPHA),
    ),
)
