"""PEFT's names without its prefix: what many training scripts write by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.adapter.findings import Finding, finding
from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.model import Adapter
from loratool.adapter.scheme import Home, Scheme
from loratool.adapter.slots import Slot
from loratool.names.paths.dotted import PathPaths
from loratool.schemes.parts.peft_config import PeftSettings
from loratool.schemes.parts.roles import EmbeddingSlots, Roles
from loratool.schemes.parts.scales import AlphaScale, ConfiguredScale, FoldedScale
from loratool.schemes.parts.settings import Settings
from loratool.variants import variant_templates

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"^(?!base_model\.model\.|diffusion_model\.|text_encoders\.).+\.\w",
    "weights": ("adapter_model.safetensors", "adapter_model.bin"),
}


class BareSettings(Settings):
    """Nothing of its own; PEFT's configuration may lie beside it."""

    def findings(self, adapter: Adapter) -> Iterator[Finding]:
        """Yield that PEFT would not find the factors that its configuration is of."""
        if adapter.config is not None:
            yield finding(
                "LT026",
                adapter.weights,
                "its keys lack 'base_model.model.'; PEFT would load it and apply nothing",
            )


SCHEME = Scheme(
    name="module-path",
    summary="dotted module path, no prefix",
    example="model.layers.0.self_attn.q_proj.lora_A.weight",
    keys=KeyTable(
        foreign=("base_model.model.", "diffusion_model.", "text_encoders."),
        modules=r"(?!(lora|lycoris|oft|boft|Hunyuan_video_I2V_lora)_[^.]+$).+",
        templates=(
            Template("{module}.lora_A.weight", Slot.DOWN),
            Template("{module}.lora_B.weight", Slot.UP),
            Template("{module}.lora_B.bias", Slot.UP_BIAS),
            Template("{module}.lora_embedding_A", Slot.EMBEDDING_DOWN),
            Template("{module}.lora_embedding_B", Slot.EMBEDDING_UP),
            Template("{module}.lora_magnitude_vector", Slot.MAGNITUDE),
            Template("{module}.alpha", Slot.ALPHA),
            Template("{module}.token_adapter.trainable_tokens_delta", Slot.ROWS),
            Template("{module}.lora_A.{adapter}.weight", Slot.DOWN),
            Template("{module}.lora_B.{adapter}.weight", Slot.UP),
            Template("{module}.lora_B.{adapter}.bias", Slot.UP_BIAS),
            Template("{module}.lora_embedding_A.{adapter}", Slot.EMBEDDING_DOWN),
            Template("{module}.lora_embedding_B.{adapter}", Slot.EMBEDDING_UP),
            Template("{module}.lora_magnitude_vector.weight", Slot.MAGNITUDE),
            Template("{module}.lora_magnitude_vector.{adapter}.weight", Slot.MAGNITUDE),
            Template("{module}.lora_magnitude_vector.{adapter}", Slot.MAGNITUDE),
            Template("{module}.lora_down.weight", Slot.DOWN),
            Template("{module}.lora_up.weight", Slot.UP),
            Template("{module}.lora_mid.weight", Slot.MID),
            Template("{module}.dora_scale", Slot.MAGNITUDE),
            *variant_templates("{module}"),
        ),
    ),
    paths=PathPaths(),
    scale=FoldedScale(),
    roles=Roles(embeddings=EmbeddingSlots()),
    settings=BareSettings(names_saved=True),
    home=Home(weights_name="adapter_model.safetensors", is_open=True),
    beside={
        "config": (ConfiguredScale(), PeftSettings()),
        "alpha": (AlphaScale(), Settings()),
    },
)
