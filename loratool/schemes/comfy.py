"""ComfyUI: dotted paths of the original checkpoint, alpha beside the factors."""

from __future__ import annotations

from typing import Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.scheme import Home, Scheme
from loratool.adapter.slots import Slot
from loratool.names.paths.native import NativePaths
from loratool.schemes.parts.roles import LycorisRoles
from loratool.schemes.parts.scales import AlphaScale
from loratool.schemes.parts.settings import Settings
from loratool.schemes.parts.tokens import BundledTokens
from loratool.variants import variant_templates

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {"keys": r"^(diffusion_model|text_encoders)\."}

SCHEME = Scheme(
    name="comfy",
    summary="ComfyUI: paths of the original checkpoint",
    example="diffusion_model.input_blocks.1.1.proj_in.lora_down.weight",
    keys=KeyTable(
        modules=r"(diffusion_model|text_encoders)\..+",
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
    ),
    paths=NativePaths(),
    scale=AlphaScale(),
    roles=LycorisRoles(),
    settings=Settings(),
    home=Home(tokens=BundledTokens(are_stacks=False)),
    priority=1,
)
