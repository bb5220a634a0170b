"""diffusers since 0.22: PEFT's keys behind the name of a pipeline's component."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter.config import LoraConfig, parse_config
from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.model import Site
from loratool.adapter.scheme import Home, Scheme
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError, UnsupportedError
from loratool.names.paths.pipeline import PipelinePaths
from loratool.schemes.parts.roles import EmbeddingSlots, Roles
from loratool.schemes.parts.scales import FoldedScale
from loratool.schemes.parts.settings import Settings
from loratool.variants import variant_templates

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"^(unet|text_encoder(_\d)?|prior|transformer(_\d)?)\.",
    "weights": ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
}

METADATA_KEY: Final = "lora_adapter_metadata"
MODEL_PARTS: Final = (
    r"(h|layer|encoder|decoder|wte|wpe|word_embeddings\w*|blocks\.\d+\.(attn\.(Wqkv|out_proj)"
    r"|ffn\.(up|down)_proj))(\.|$)"
)
"""What follows ``transformer.`` in language models, which have modules of that name."""


class DiffusersSettings(Settings):
    """The weights file may say in its metadata what PEFT's configuration would say."""

    def read(
        self,
        sites: tuple[Site, ...],
        metadata: Mapping[str, str],
        sidecar: Mapping[str, Any] | None,
        where: Path,
    ) -> tuple[Site, ...]:
        """Return ``sites`` with the alphas and ranks in the metadata.

        Raises:
            AdapterError: It cannot be understood.
            UnsupportedError: The delta is relative to a base that the initialisation changed.
        """
        settings = _by_component(metadata)
        if settings is None:
            return sites
        configs = _configs(settings, sites)
        return tuple(_configured(site, configs) for site in sites)


def _by_component(metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
    text = metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(METADATA_KEY, f"is no JSON: {error}", code="LT015") from None
    if not isinstance(fields, dict):
        raise AdapterError(METADATA_KEY, "is no JSON object", code="LT015")
    found: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        component, _, field = name.partition(".")
        found.setdefault(component, {})[field] = value
    return found


def _configs(settings: Mapping[str, Any], sites: Iterable[Site]) -> Mapping[str, LoraConfig]:
    """Return what the metadata says about each component that has sites.

    Raises:
        AdapterError: A field that matters holds something impossible.
        UnsupportedError: The delta is relative to a base that the initialisation changed.
    """
    components = dict.fromkeys(site.module.partition(".")[0] for site in sites)
    configs = {
        name: parse_config(settings[name], where=f"metadata: {name}")
        for name in components
        if name in settings
    }
    for name, config in configs.items():
        if config.init.changes_base:
            raise UnsupportedError(f"metadata: {name}", config.init.refusal)
    return configs


def _configured(site: Site, configs: Mapping[str, LoraConfig]) -> Site:
    """Return ``site`` with what the metadata says about its component's ranks and alphas."""
    component, _, local = site.module.partition(".")
    config = configs.get(component)
    if config is None or Slot.ALPHA in site.slots or site.scaling.alpha is not None:
        return site
    return replace(site, scaling=config.scaling_for(local, site.rank))


SCHEME = Scheme(
    name="diffusers",
    summary="diffusers: PEFT's names behind unet., transformer., text_encoder.",
    example="unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
    keys=KeyTable(
        modules=rf"(unet|text_encoder(_\d)?|prior)\..+|transformer(_\d)?\.(?!{MODEL_PARTS}).+",
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
    ),
    paths=PipelinePaths(),
    scale=FoldedScale(),
    roles=Roles(embeddings=EmbeddingSlots(), drops_kernels=True),
    settings=DiffusersSettings(stale=METADATA_KEY),
    home=Home(weights_name="pytorch_lora_weights.safetensors"),
    priority=1,
)
