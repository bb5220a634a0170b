"""Parts of a pipeline as people speak of them: ``unet down``, ``te2``."""

from __future__ import annotations

from typing import Final

from loratool.names.pipelines import component_of
from loratool.names.spellings import component_names

__all__ = ["section_of"]

STAGES: Final = {
    "down_blocks": "down",
    "input_blocks": "down",
    "mid_block": "mid",
    "middle_block": "mid",
    "up_blocks": "up",
    "output_blocks": "up",
}
"""The halves of a U-Net and what lies between, in the names of diffusers and of checkpoints."""


def section_of(module: str, known: frozenset[str] = frozenset(), family: str | None = None) -> str:
    """Return which part of a pipeline a module is in; empty where it is a model by itself.

    Args:
        module: Its dotted path.
        known: What is a component for certain.
        family: The pipeline, where known.
    """
    component, local = component_of(module, known)
    if component is None:
        return ""
    if component.startswith("text_encoder"):
        return component_names(component, family)[1]  # te1, or te where it has no number
    stage = STAGES.get(local.partition(".")[0], "") if component == "unet" else ""
    return f"{component} {stage}".rstrip()
