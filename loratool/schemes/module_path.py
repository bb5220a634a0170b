"""PEFT's names without its prefix: what many training scripts write by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter.findings import Finding, finding
from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.model import Adapter, Site
from loratool.adapter.scaling import Scaling
from loratool.adapter.scheme import Home, Scheme
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError
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

ALPHA_KEY: Final = "alpha"
"""Metadata: the alpha of all modules."""


class BareSettings(Settings):
    """PEFT's configuration may lie beside it; DiffSynth-Studio's files may record one alpha."""

    def read(
        self,
        sites: tuple[Site, ...],
        metadata: Mapping[str, str],
        sidecar: Mapping[str, Any] | None,
        where: Path,
    ) -> tuple[Site, ...]:
        """Return ``sites`` with the alpha in the metadata, where nothing else records one.

        Raises:
            AdapterError: It is no number.
        """
        text = metadata.get(ALPHA_KEY)
        if text is None or not all(map(_is_diffsynths, sites)):
            return sites
        try:
            alpha = float(text)
        except ValueError:
            alpha = math.nan
        if not math.isfinite(alpha):
            raise AdapterError(
                f"metadata: {ALPHA_KEY}",
                f"is {text!r}, expected a number",
                hint=f"take it out: loratool metadata FILE --remove {ALPHA_KEY} -o OUT",
                code="LT015",
            )
        return tuple(replace(site, scaling=Scaling(alpha, site.rank)) for site in sites)

    def findings(self, adapter: Adapter) -> Iterator[Finding]:
        """Yield that PEFT would not find the factors that its configuration is of."""
        if adapter.config is not None:
            yield finding(
                "LT026",
                adapter.weights,
                "its keys lack 'base_model.model.'; PEFT would load it and apply nothing",
            )


def _is_diffsynths(site: Site) -> bool:
    """Whether its factors carry PEFT's name of an adapter, and it has no alpha."""
    is_named = site.down is not None and site.down.spec.name.endswith(".lora_A.default.weight")
    return is_named and site.scaling.alpha is None and site.variant.is_scaled


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
            # Dictionaries of bare parameters, by the names of adapters.
            Template("{module}.lora_A.{adapter}", Slot.DOWN),
            Template("{module}.lora_B.{adapter}", Slot.UP),
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
