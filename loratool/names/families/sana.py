"""Sana: the original names, which fuse projections, and those of diffusers.

Its feed-forward layers are convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from loratool.names.family import Family, Fusion, Row, single

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["sana", "sana-sprint"],
    "segments": [
        "attention_y_norm",
        "blocks",
        "caption_norm",
        "caption_projection",
        "cfg_embedder",
        "final_layer",
        "patch_embed",
        "proj_out",
        "t_block",
        "t_embedder",
        "time_embed",
        "transformer_blocks",
        "x_embedder",
        "y_embedder",
    ],
}
"""How paths begin, in either naming."""

BLOCKS: Final = 60

ENDS: Final = {
    "x_embedder.proj": "patch_embed.proj",
    "t_block.1": "time_embed.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "final_layer.linear": "proj_out",
}

TIME: Final = {
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
}
GUIDED_TIME: Final = {
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
}

BLOCK, HUB_BLOCK = "blocks.*", "transformer_blocks.*"

IN_BLOCK: Final = {
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_norm": "attn2.norm_q",
    "cross_attn.k_norm": "attn2.norm_k",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.inverted_conv.conv": "ff.conv_inverted",
    "mlp.depth_conv.conv": "ff.conv_depth",
    "mlp.point_conv.conv": "ff.conv_point",
}
"""The norms of queries and keys are in Sana 1.5 and Sprint alone."""

FUSED: Final = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}


def rows(ends: Mapping[str, str]) -> Iterator[Row]:
    """Yield the table of a model with these first and last layers."""
    for native, hub in ends.items():
        yield single(native, hub)
    for native, hub in IN_BLOCK.items():
        yield single(f"{BLOCK}.{native}", f"{HUB_BLOCK}.{hub}", BLOCKS)
    for native, parts in FUSED.items():
        fusion = Fusion(tuple(f"{HUB_BLOCK}.{part}" for part in parts))
        yield Row(f"{BLOCK}.{native}", fusion, BLOCKS)


SANA: Final = Family(
    "sana",
    "transformer",
    tuple(rows(ENDS | TIME)),
    depths=(20, 28),
    widths={".attn1.to_q": (1152, 2240), ".attn2.to_k": (1152, 2240)},
    encoders={"text_encoder": "gemma2_2b"},
)
"""Sana and Sana 1.5 of any depth."""

SPRINT: Final = Family(
    "sana-sprint",
    "transformer",
    tuple(rows(ENDS | GUIDED_TIME)),
    refines="sana",
    depths=(20, 28),
    encoders={"text_encoder": "gemma2_2b"},
)
"""Sana Sprint, which embeds the strength of its guidance besides the time."""

FAMILIES: Final = (SANA, SPRINT)
