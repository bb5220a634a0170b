"""PEFT's names without its prefix: what many training scripts write by hand."""

from __future__ import annotations

from loratool.adapter.scheme import Embeddings, KeyScheme, Template
from loratool.adapter.slots import Slot
from loratool.variants import variant_templates

__all__ = ["SCHEME"]

SCHEME = KeyScheme(
    name="module-path",
    summary="dotted module path, no prefix",
    example="model.layers.0.self_attn.q_proj.lora_A.weight",
    writes=True,
    embeddings=Embeddings.SLOTS,
    is_open=True,
    weights_name="adapter_model.safetensors",
    foreign=("base_model.model.", "diffusion_model.", "text_encoders."),
    modules=r"(?!(lora|lycoris|oft|boft)_[^.]+$).+",
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
)
