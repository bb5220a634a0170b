"""Wan: the original names, and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import Family, Row, single

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["wan"],
    "segments": [
        "blocks",
        "condition_embedder",
        "head",
        "img_emb",
        "patch_embedding",
        "proj_out",
        "text_embedding",
        "time_embedding",
        "time_projection",
    ],
}
"""How paths begin, in either naming."""

BLOCKS: Final = 40

ENDS: Final = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}

ATTENTIONS: Final = {"self_attn": "attn1", "cross_attn": "attn2"}

ATTENTION: Final = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}

BLOCK: Final = {
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",  # numbered by place in the one naming, by what they precede in the other
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def rows() -> Iterator[Row]:
    """Yield the table."""
    for native, hub in ENDS.items():
        yield single(native, hub)
    for attention, hub_attention in ATTENTIONS.items():
        for native, hub in ATTENTION.items():
            yield single(
                f"blocks.*.{attention}.{native}", f"blocks.*.{hub_attention}.{hub}", BLOCKS
            )
    for native, hub in BLOCK.items():
        yield single(f"blocks.*.{native}", f"blocks.*.{hub}", BLOCKS)


WAN: Final = Family("wan", "transformer", tuple(rows()))
"""Wan 2.1 and 2.2, from text and from images; the smaller models have fewer of the same blocks."""

FAMILIES: Final = (WAN,)
