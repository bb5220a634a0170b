"""ComfyUI: dotted paths of the original checkpoint, alpha beside the factors."""

from __future__ import annotations

from loratool.adapter.scheme import Embeddings, KeyScheme, ScaleRule, Spelling, Template
from loratool.adapter.slots import Slot
from loratool.variants import variant_templates

__all__ = ["SCHEME"]

SCHEME = KeyScheme(
    name="comfy",
    summary="ComfyUI: paths of the original checkpoint",
    example="diffusion_model.input_blocks.1.1.proj_in.lora_down.weight",
    writes=True,
    scale=ScaleRule.ALPHA,
    spelling=Spelling.NATIVE,
    embeddings=Embeddings.WEIGHT,
    modules=r"(diffusion_model|text_encoders)\..+",
    priority=1,
    templates=(
        Template("{module}.lora_down.weight", Slot.DOWN),
        Template("{module}.lora_up.weight", Slot.UP),
        Template("{module}.lora_mid.weight", Slot.MID),
        Template("{module}.alpha", Slot.ALPHA),
        Template("{module}.dora_scale", Slot.MAGNITUDE),
        *variant_templates("{module}"),
        # Also read.
        Template("{module}.lora_A.weight", Slot.DOWN),
        Template("{module}.lora_B.weight", Slot.UP),
        Template("{module}.lora_B.bias", Slot.UP_BIAS),
        Template("{module}.lora_A.{adapter}.weight", Slot.DOWN),
        Template("{module}.lora_B.{adapter}.weight", Slot.UP),
    ),
)
