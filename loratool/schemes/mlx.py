"""Apple's mlx-lm: factors transposed, and a configuration that holds the multiplier itself."""

from __future__ import annotations

from loratool.adapter.scheme import Embeddings, KeyScheme, ScaleRule, Template
from loratool.adapter.slots import Slot

__all__ = ["SCHEME"]

SCHEME = KeyScheme(
    name="mlx",
    summary="mlx-lm: transposed factors, a scale in adapter_config.json",
    example="model.layers.0.self_attn.q_proj.lora_a",
    writes=True,
    scale=ScaleRule.MULTIPLIER,
    embeddings=Embeddings.FACTORS,
    is_transposed=True,
    has_convolutions=False,
    weights_name="adapters.safetensors",
    has_config=True,
    foreign=("base_model.model.",),
    templates=(
        Template("{module}.lora_a", Slot.DOWN),
        Template("{module}.lora_b", Slot.UP),
        Template("{module}.m", Slot.MAGNITUDE),
    ),
)
