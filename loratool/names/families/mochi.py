"""Mochi: Genmo's names, which fuse projections and exchange halves, and those of diffusers.

The last block's text goes no further, so it has fewer modules there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import T5, Family, Fusion, Row, single

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["mochi"],
    "segments": [
        "blocks",
        "final_layer",
        "norm_out",
        "patch_embed",
        "proj_out",
        "t5_y_embedder",
        "t5_yproj",
        "t_embedder",
        "time_embed",
        "transformer_blocks",
        "x_embedder",
    ],
}
"""How paths begin, in either naming."""

BLOCKS: Final = 48

ENDS: Final = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    "t5_y_embedder.to_kv": "time_embed.pooler.to_kv",
    "t5_y_embedder.to_q": "time_embed.pooler.to_q",
    "t5_y_embedder.to_out": "time_embed.pooler.to_out",
    "t5_yproj": "time_embed.caption_proj",
    "final_layer.linear": "proj_out",
}

BLOCK, HUB_BLOCK = "blocks.*", "transformer_blocks.*"

EVERY_BLOCK: Final = {
    "mod_x": "norm1.linear",
    "attn.q_norm_x": "attn1.norm_q",
    "attn.k_norm_x": "attn1.norm_k",
    "attn.q_norm_y": "attn1.norm_added_q",
    "attn.k_norm_y": "attn1.norm_added_k",
    "attn.proj_x": "attn1.to_out.0",
    "mlp_x.w2": "ff.net.2",
}
BUT_THE_LAST: Final = {
    "mod_y": "norm1_context.linear",
    "attn.proj_y": "attn1.to_add_out",
    "mlp_y.w2": "ff_context.net.2",
}
FUSED: Final = {
    "attn.qkv_x": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.qkv_y": ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
}
EXCHANGED: Final = (
    ("mlp_x.w1", "ff.net.0.proj", BLOCKS),
    ("mlp_y.w1", "ff_context.net.0.proj", BLOCKS - 1),
)
"""The gate comes first in the one naming, and last in the other."""


def rows() -> Iterator[Row]:
    """Yield the table."""
    for native, hub in ENDS.items():
        yield single(native, hub)
    yield single("final_layer.mod", "norm_out.linear", swapped=True)
    for names, count in ((EVERY_BLOCK, BLOCKS), (BUT_THE_LAST, BLOCKS - 1)):
        for native, hub in names.items():
            yield single(f"{BLOCK}.{native}", f"{HUB_BLOCK}.{hub}", count)
    last = BLOCKS - 1
    yield single(f"blocks.{last}.mod_y", f"transformer_blocks.{last}.norm1_context.linear_1")
    for native, parts in FUSED.items():
        fusion = Fusion(tuple(f"{HUB_BLOCK}.{part}" for part in parts))
        yield Row(f"{BLOCK}.{native}", fusion, BLOCKS)
    for native, hub, count in EXCHANGED:
        yield single(f"{BLOCK}.{native}", f"{HUB_BLOCK}.{hub}", count, swapped=True)


MOCHI: Final = Family(
    "mochi",
    "transformer",
    tuple(rows()),
    encoders={"text_encoder": T5},
    widths={".attn1.to_q": (3072,)},
)
"""Mochi 1."""

FAMILIES: Final = (MOCHI,)
