"""Which layers store their weight as ``(in, out)``: transformers' Conv1D."""

from __future__ import annotations

from typing import Final

__all__ = ["CONV1D_LEAVES", "CONV1D_MODEL_TYPES"]

CONV1D_MODEL_TYPES: Final = frozenset(
    ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
)
"""Model types of transformers whose blocks are built of Conv1D."""

CONV1D_LEAVES: Final = frozenset(("c_attn", "c_proj", "c_fc", "q_attn"))
"""The names of such layers; every other layer of these models is an ordinary linear one."""
