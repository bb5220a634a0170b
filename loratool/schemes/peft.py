"""Hugging Face PEFT: ``base_model.model.`` before the module, the configuration beside it."""

from __future__ import annotations

from typing import Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.scheme import Home, Scheme
from loratool.adapter.slots import Slot
from loratool.names.paths.dotted import PathPaths
from loratool.schemes.parts.peft_config import PeftSettings
from loratool.schemes.parts.roles import EmbeddingSlots, Roles
from loratool.schemes.parts.scales import ConfiguredScale
from loratool.variants import variant_templates

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"^base_model\.model\.",
    "weights": ("adapter_model.safetensors", "adapter_model.bin"),
    "sidecar": "adapter_config.json",
}

PREFIX: Final = "base_model.model."

SCHEME = Scheme(
    name="peft",
    summary="Hugging Face PEFT, with adapter_config.json",
    example="base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    keys=KeyTable(
        prefix=PREFIX,
        templates=(
            Template(PREFIX + "{module}.lora_A.weight", Slot.DOWN),
            Template(PREFIX + "{module}.lora_B.weight", Slot.UP),
            Template(PREFIX + "{module}.lora_B.bias", Slot.UP_BIAS),
            Template(PREFIX + "{module}.lora_embedding_A", Slot.EMBEDDING_DOWN),
            Template(PREFIX + "{module}.lora_embedding_B", Slot.EMBEDDING_UP),
            Template(PREFIX + "{module}.lora_magnitude_vector", Slot.MAGNITUDE),
            Template(PREFIX + "{module}.lora_E", Slot.SINGULAR),
            Template(PREFIX + "{module}.lora_diag", Slot.DIAGONAL),
            Template(PREFIX + "{module}.token_adapter.trainable_tokens_delta", Slot.ROWS),
            Template(PREFIX + "{module}.trainable_tokens_delta", Slot.ROWS, is_factor=True),
            Template(PREFIX + "{module}.lora_velora_embed", Slot.STATE),
            # Also read: bare parameters (AdaLoRA), and files that kept the adapter's name.
            Template(PREFIX + "{module}.lora_A", Slot.DOWN),
            Template(PREFIX + "{module}.lora_B", Slot.UP),
            Template(PREFIX + "{module}.lora_A.{adapter}.weight", Slot.DOWN),
            Template(PREFIX + "{module}.lora_B.{adapter}.weight", Slot.UP),
            Template(PREFIX + "{module}.lora_B.{adapter}.bias", Slot.UP_BIAS),
            Template(PREFIX + "{module}.lora_A.{adapter}", Slot.DOWN),
            Template(PREFIX + "{module}.lora_B.{adapter}", Slot.UP),
            Template(PREFIX + "{module}.lora_embedding_A.{adapter}", Slot.EMBEDDING_DOWN),
            Template(PREFIX + "{module}.lora_embedding_B.{adapter}", Slot.EMBEDDING_UP),
            Template(PREFIX + "{module}.lora_magnitude_vector.weight", Slot.MAGNITUDE),
            Template(PREFIX + "{module}.lora_magnitude_vector.{adapter}.weight", Slot.MAGNITUDE),
            Template(PREFIX + "{module}.lora_magnitude_vector.{adapter}", Slot.MAGNITUDE),
            Template(PREFIX + "{module}.lora_E.{adapter}", Slot.SINGULAR),
            Template(PREFIX + "{module}.lora_diag.{adapter}", Slot.DIAGONAL),
            Template(PREFIX + "{module}.token_adapter.trainable_tokens_delta.{adapter}", Slot.ROWS),
            Template(PREFIX + "{module}.lora_velora_embed.{adapter}", Slot.STATE),
            *(
                Template(PREFIX + "{module}.lora_monteclora_sampler." + name, Slot.STATE)
                for name in (
                    "expert_weights",
                    "expert_weights_prior",
                    "gaussian_var_prior",
                    "std_prior",
                )
            ),
            Template(PREFIX + "{module}.ranknum", Slot.STATE),
            *variant_templates(PREFIX + "{module}", has_peft=True),
        ),
    ),
    paths=PathPaths(),
    scale=ConfiguredScale(),
    roles=Roles(embeddings=EmbeddingSlots()),
    settings=PeftSettings(is_own=True),
    home=Home(weights_name="adapter_model.safetensors", is_open=True, library="peft"),
    resembles=(
        (r"ia3_l", "(IA)³ vectors, but not behind PEFT's base_model.model"),
        (r"^prompt_embeddings$|prefix", "a trained prompt: there is no delta"),
        (r"\.oft_r(\.|$)", "OFT rotations of PEFT before 0.15, which no later version reads"),
        (
            r"unilora_theta_d$",
            "UniLoRA's vector without its places (save_indices was false): only the order of the "
            "live model's modules tells them",
        ),
        (r"lily_(A|B|router)", "a Lily router: no fixed weights equal it"),
        (r"internal_xlora_classifier", "an X-LoRA router: no fixed weights equal it"),
    ),
)
