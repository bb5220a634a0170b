"""Which weights of two dimensions are tables to look rows up in, not matrices to multiply by."""

from __future__ import annotations

import re
from typing import Final

from loratool.names.tied import EMBEDDING_LEAVES

__all__ = ["is_embedding"]

TABLES: Final = re.compile(
    r"(.*_)?embeddings?(_.*)?|embed_.*|wpe|w[tp]e_.*|relative_attention_bias|pos_embed|embed"
)
"""Position and segment tables of the libraries' models, by the last component of their path."""


def is_embedding(module: str) -> bool:
    """Whether a module of this path is an ``nn.Embedding``."""
    leaf = module.rpartition(".")[2]
    if leaf in ("embed_out", "patch_embedding", "patch_embeddings"):
        return False
    return leaf in EMBEDDING_LEAVES or TABLES.fullmatch(leaf) is not None
