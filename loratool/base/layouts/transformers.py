"""A model as its library saves it: the paths of the files are those of its modules."""

from __future__ import annotations

from typing import Final

from loratool.base.config import ModelConfig
from loratool.base.layout import Fused, Headers, Layout

__all__ = ["LAYOUT"]

PARTS: Final = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Projections that some models have in one, one after the other: what others have apart."""
FUSED_TYPES: Final = {
    "qkv_proj": frozenset(("phi3", "phi4_multimodal")),
    "gate_up_proj": frozenset(
        (
            "phi3",
            "glm",
            "glm4",
            "glm4v",
            "glm4v_text",
            "glm_image",
            "glm_image_text",
            "glm_ocr",
            "glm_ocr_text",
        )
    ),
}
"""The model types whose files have them in one, in this order. Others mix them row by row."""


class Transformers(Layout):
    """What every model is unless something more specific claims it."""

    name = "transformers"

    def claims(self, headers: Headers) -> int:
        return 1

    def fused(self, module: str, config: ModelConfig) -> Fused | None:
        parent, _, leaf = module.rpartition(".")
        if leaf in PARTS:
            return _fused(parent, leaf, config)
        whole = next((whole for whole, parts in PARTS.items() if leaf in parts), None)
        if whole is None or not config.model_types & FUSED_TYPES[whole]:
            return None
        return _fused(parent, whole, config)


def _fused(parent: str, whole: str, config: ModelConfig) -> Fused:
    rows = (config.projection_rows or (0,)) if whole == "qkv_proj" else ()
    return Fused(f"{parent}.{whole}", tuple(f"{parent}.{part}" for part in PARTS[whole]), rows)


LAYOUT = Transformers()
