"""Where the samples are, and the smallest one: the factors of one linear module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"


def lora(module: str, out: int, into: int, rank: int = 4, **kinds: Any) -> dict[str, torch.Tensor]:
    """Return random factors for one linear module."""
    return {
        f"{module}.lora_A.weight": torch.randn(rank, into, **kinds),
        f"{module}.lora_B.weight": torch.randn(out, rank, **kinds),
    }
