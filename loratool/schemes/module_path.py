"""PEFT's names without its prefix: what many training scripts write by hand."""

from __future__ import annotations

from loratool.adapter.scheme import KeyScheme, Template
from loratool.adapter.slots import Slot

__all__ = ["SCHEME"]

SCHEME = KeyScheme(
    name="module-path",
    summary="dotted module path, no prefix",
    example="model.layers.0.self_attn.q_proj.lora_A.weight",
    writes=True,
    foreign=("base_model.model.",),
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
    ),
)
