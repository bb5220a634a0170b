"""LoRA (arXiv 2106.09685): ``Δ = scale · B @ A``."""

from __future__ import annotations

from loratool.adapter.plain import Plain

__all__ = ["VARIANT"]

CLAIM = {"peft_types": ["LORA"]}

VARIANT = Plain()
