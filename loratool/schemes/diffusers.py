"""diffusers since 0.22: PEFT's keys behind the name of a pipeline's component."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from loratool.adapter.scheme import Embeddings, KeyScheme, Spelling, Template
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError
from loratool.variants import variant_templates

__all__ = ["METADATA_KEY", "SCHEME"]

METADATA_KEY: Final = "lora_adapter_metadata"
MODEL_PARTS: Final = (
    r"(h|layer|encoder|decoder|wte|wpe|word_embeddings\w*|blocks\.\d+\.(attn\.(Wqkv|out_proj)"
    r"|ffn\.(up|down)_proj))(\.|$)"
)
"""What follows ``transformer.`` in language models, which have modules of that name."""


class DiffusersScheme(KeyScheme):
    """The weights file may say in its metadata what PEFT's configuration would say."""

    def settings(self, metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
        text = metadata.get(METADATA_KEY)
        if text is None:
            return None
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise AdapterError(METADATA_KEY, f"is no JSON: {error}") from None
        if not isinstance(fields, dict):
            raise AdapterError(METADATA_KEY, "is no JSON object")
        found: dict[str, dict[str, Any]] = {}
        for name, value in fields.items():
            component, _, field = name.partition(".")
            found.setdefault(component, {})[field] = value
        return found


SCHEME = DiffusersScheme(
    name="diffusers",
    summary="diffusers: PEFT's names behind unet., transformer., text_encoder.",
    example="unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
    writes=True,
    spelling=Spelling.PIPELINE,
    embeddings=Embeddings.SLOTS,
    weights_name="pytorch_lora_weights.safetensors",
    modules=rf"(unet|text_encoder(_\d)?|prior)\..+|transformer(_\d)?\.(?!{MODEL_PARTS}).+",
    priority=1,
    templates=(
        Template("{module}.lora_A.weight", Slot.DOWN),
        Template("{module}.lora_B.weight", Slot.UP),
        Template("{module}.lora_B.bias", Slot.UP_BIAS),
        Template("{module}.lora_embedding_A", Slot.EMBEDDING_DOWN),
        Template("{module}.lora_embedding_B", Slot.EMBEDDING_UP),
        Template("{module}.lora_magnitude_vector", Slot.MAGNITUDE),
        # Also read.
        Template("{module}.lora_magnitude_vector.weight", Slot.MAGNITUDE),
        Template("{module}.alpha", Slot.ALPHA),
        Template("{module}.lora_A.{adapter}.weight", Slot.DOWN),
        Template("{module}.lora_B.{adapter}.weight", Slot.UP),
        Template("{module}.lora_A", Slot.DOWN),
        Template("{module}.lora_B", Slot.UP),
        Template("{module}.lora_down.weight", Slot.DOWN),
        Template("{module}.lora_up.weight", Slot.UP),
        Template("{module}.lora_mid.weight", Slot.MID),
        Template("{module}.dora_scale", Slot.MAGNITUDE),
        *variant_templates("{module}"),
    ),
)
