"""Which weights of two dimensions are not matrices of linear layers: tables, and routers."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from loratool.names.tied import EMBEDDING_LEAVES

__all__ = ["is_embedding", "is_router"]

TABLES: Final = re.compile(
    r"(\w+_)?(embeddings?|embeds?|emb)|embed_(tokens|positions|in|layers?)|w[tp]e|tokens_embed"
    r"|relative_attention_bias"
)
"""Position and segment tables of the libraries' models, by the last component of their path."""


def is_embedding(module: str) -> bool:
    """Whether a module of this path is an ``nn.Embedding``."""
    leaf = module.rpartition(".")[2]
    if leaf == "embed_out" or leaf.endswith(("patch_embedding", "patch_embeddings")):
        return False
    return leaf in EMBEDDING_LEAVES or TABLES.fullmatch(leaf) is not None


def is_router(module: str, modules: Collection[str]) -> bool:
    """Whether a module of this path chooses among experts beside it.

    Routers hold a bare weight; libraries do not adapt them as linear layers.
    """
    parent, _, leaf = module.rpartition(".")
    beside = f"{parent}.experts"
    return leaf in ("router", "gate") and any(
        other == beside or other.startswith(f"{beside}.") for other in modules
    )
