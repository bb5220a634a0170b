"""LoRA (arXiv 2106.09685): ``Δ = scale · B @ A``."""

from __future__ import annotations

from loratool.adapter.plain import Plain

__all__ = ["VARIANT"]

# The type of trained tokens has no deltas at all, and rows beside them as LoRA may have.
CLAIM = {"peft_types": ["LORA", "TRAINABLE_TOKENS"]}

VARIANT = Plain()
