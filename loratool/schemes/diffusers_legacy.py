"""diffusers 0.12 to 0.21: attention processors, ``.lora.`` layers and text encoders.

AnimateDiff's motion LoRAs are such, in the names of its own modules.
"""

from __future__ import annotations

import re
from typing import Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.scheme import Home, Scheme
from loratool.adapter.slots import AdapterKey, Slot
from loratool.names.paths.pipeline import ProcessorPaths
from loratool.schemes.parts.roles import Roles
from loratool.schemes.parts.scales import FoldedScale
from loratool.schemes.parts.settings import Settings

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"(_lora|\.lora|\.lora_linear_layer)\.(down|up)\.weight$",
    "weights": ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
}

SIDES: Final = {"down": Slot.DOWN, "up": Slot.UP}
PROCESSOR: Final = re.compile(
    r"(?P<attention>.+)\.processor\.(?P<leaf>\w+)_lora\.(?P<side>down|up)\.weight", re.DOTALL
)
TEXT_ATTENTION: Final = re.compile(
    r"(?P<attention>.+)\.to_(?P<leaf>q|k|v|out)_lora\.(?P<side>down|up)\.weight", re.DOTALL
)
LAYER: Final = re.compile(
    r"(?P<module>.+)\.(lora|lora_linear_layer)\.(?P<side>down|up)\.weight", re.DOTALL
)
ATTENTION: Final = re.compile(
    r"(?P<attention>.+\.(attn\d?|attention_blocks\.\d))\.(?P<leaf>to_q|to_k|to_v|to_out\.0)",
    re.DOTALL,
)
OUTPUT: Final = {"to_out": "to_out.0", "to_add_out": "to_add_out"}


class LegacyKeys(KeyTable):
    """Keys that depend on the kind of layer that the factors adapt."""

    def parse(self, key: str) -> AdapterKey | None:
        if match := PROCESSOR.fullmatch(key):
            leaf = OUTPUT.get(match["leaf"], match["leaf"])
            return AdapterKey(f"{match['attention']}.{leaf}", SIDES[match["side"]])
        if match := TEXT_ATTENTION.fullmatch(key):
            return AdapterKey(f"{match['attention']}.{match['leaf']}_proj", SIDES[match["side"]])
        if match := LAYER.fullmatch(key):
            return AdapterKey(match["module"], SIDES[match["side"]])
        return self._parse_plain(key) if key.endswith(".alpha") else None

    def format(self, key: AdapterKey) -> str:
        if key.slot not in SIDES.values():
            raise KeyError(f"there is no name for {key.slot.value}")
        if key.module.startswith("text_encoder"):
            return f"{key.module}.lora_linear_layer.{key.slot.value}.weight"
        if match := ATTENTION.fullmatch(key.module):
            leaf = match["leaf"].removesuffix(".0")
            return f"{match['attention']}.processor.{leaf}_lora.{key.slot.value}.weight"
        return f"{key.module}.lora.{key.slot.value}.weight"


SCHEME = Scheme(
    name="diffusers-legacy",
    summary="diffusers before 0.22: processor.to_q_lora, lora.down, lora_linear_layer",
    example="unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
    keys=LegacyKeys(
        templates=(
            Template("{module}.lora.down.weight", Slot.DOWN),
            Template("{module}.lora.up.weight", Slot.UP),
            Template("{module}.alpha", Slot.ALPHA),
        ),
    ),
    paths=ProcessorPaths(),
    scale=FoldedScale(),
    roles=Roles(drops_kernels=True),
    settings=Settings(),
    home=Home(weights_name="pytorch_lora_weights.safetensors"),
)
