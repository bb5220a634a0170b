"""One spelling for module paths that differ only by wrappers and by library versions.

Two names that canonicalise alike may mean the same module; whoever compares them has to make
sure that exactly one candidate does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

__all__ = ["canonical_path"]

WRAPPERS: Final = frozenset(
    ("model", "base_model", "module", "language_model", "text_model", "vision_model", "_orig_mod")
)
"""Components that wrappers and versions of transformers add, drop or move, before any layer."""

RENAMES: Final = (
    # Mixtral's and its relatives' expert blocks, before and since transformers 5.
    (".block_sparse_moe.", ".mlp."),
    # ViT and its relatives, before and since transformers 5.
    (".encoder.layer.", ".layers."),
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    # GPT-NeoX's head.
    (".embed_out.", ".lm_head."),
)


@lru_cache(maxsize=1 << 17)
def canonical_path(module: str) -> str:
    """Return the canonical spelling of a dotted module path."""
    parts = module.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    kept = [part for i, part in enumerate(parts) if i >= first or part not in WRAPPERS]
    name = f".{'.'.join(kept)}."
    for old, new in RENAMES:
        name = name.replace(old, new)
    return name.strip(".")
