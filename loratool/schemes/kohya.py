"""kohya-ss/sd-scripts and LyCORIS: flattened module paths, alpha beside the factors."""

from __future__ import annotations

from loratool.adapter.scheme import Embeddings, KeyScheme, ScaleRule, Spelling, Template
from loratool.adapter.slots import Slot
from loratool.variants import variant_templates

__all__ = ["SCHEME"]

SCHEME = KeyScheme(
    name="kohya",
    summary="sd-scripts, LyCORIS, A1111: flattened paths and alphas",
    example="lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
    writes=True,
    scale=ScaleRule.ALPHA,
    spelling=Spelling.FLAT,
    embeddings=Embeddings.WEIGHT,
    modules=r"(lora|lycoris|oft|boft)_[^.]+",
    templates=(
        Template("{module}.lora_down.weight", Slot.DOWN),
        Template("{module}.lora_up.weight", Slot.UP),
        Template("{module}.lora_mid.weight", Slot.MID),
        Template("{module}.alpha", Slot.ALPHA),
        Template("{module}.dora_scale", Slot.MAGNITUDE),
        *variant_templates("{module}"),
        Template("{module}.weight", Slot.IA3, is_factor=True),
        # Also read.
        Template("{module}.lora_A.weight", Slot.DOWN),
        Template("{module}.lora_B.weight", Slot.UP),
        Template("{module}.lora_B.bias", Slot.UP_BIAS),
        Template("{module}.lora_magnitude_vector", Slot.MAGNITUDE),
    ),
)
