"""mlx-lm's stacked experts, and the per-expert modules of transformers that they are."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["expert_path", "stacked_path"]

STACK: Final = "switch_mlp"
MIXTRAL: Final = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""What Mixtral's blocks call the projections of an expert."""
EXPERT: Final = re.compile(
    r"(?P<parent>.+)\.experts\.(?P<index>[0-9]{1,9})\.(?P<leaf>[^.]+)", re.DOTALL
)


def expert_path(module: str, index: int) -> str | None:
    """Return the path of one expert of a stacked module; ``None`` if it is none."""
    parent, _, leaf = module.rpartition(".")
    before, _, stack = parent.rpartition(".")
    if stack != STACK or not before:
        return None
    if before.endswith("block_sparse_moe"):
        leaf = MIXTRAL.get(leaf, leaf)
    return f"{before}.experts.{index}.{leaf}"


def stacked_path(module: str) -> tuple[str, int] | None:
    """Return the stacked module that an expert's projection belongs to, and its place in it."""
    match = EXPERT.fullmatch(module)
    if match is None:
        return None
    names = {new: old for old, new in MIXTRAL.items()}
    leaf = names.get(match["leaf"], match["leaf"])
    return f"{match['parent']}.{STACK}.{leaf}", int(match["index"])
