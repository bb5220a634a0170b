"""PixArt alpha and sigma: the original names, which fuse projections, and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import T5, Family, Fusion, Row, single

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["pixart"],
    "segments": [
        "adaln_single",
        "ar_embedder",
        "blocks",
        "caption_projection",
        "csize_embedder",
        "final_layer",
        "pos_embed",
        "proj_out",
        "t_block",
        "t_embedder",
        "transformer_blocks",
        "x_embedder",
        "y_embedder",
    ],
}
"""How paths begin, in either naming."""

BLOCKS: Final = 28

EMBEDDERS: Final = {
    "t_embedder": "timestep_embedder",
    "csize_embedder": "resolution_embedder",
    "ar_embedder": "aspect_ratio_embedder",
}
"""Those of the size are in some releases of alpha alone."""

ENDS: Final = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
}

BLOCK, HUB_BLOCK = "blocks.*", "transformer_blocks.*"

IN_BLOCK: Final = {
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
FUSED: Final = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}


def rows() -> Iterator[Row]:
    """Yield the table."""
    for native, hub in ENDS.items():
        yield single(native, hub)
    for native, hub in EMBEDDERS.items():
        yield single(f"{native}.mlp.0", f"adaln_single.emb.{hub}.linear_1")
        yield single(f"{native}.mlp.2", f"adaln_single.emb.{hub}.linear_2")
    for native, hub in IN_BLOCK.items():
        yield single(f"{BLOCK}.{native}", f"{HUB_BLOCK}.{hub}", BLOCKS)
    for native, parts in FUSED.items():
        fusion = Fusion(tuple(f"{HUB_BLOCK}.{part}" for part in parts))
        yield Row(f"{BLOCK}.{native}", fusion, BLOCKS)


PIXART: Final = Family(
    "pixart",
    "transformer",
    tuple(rows()),
    encoders={"text_encoder": T5},
    widths={".attn1.to_q": (1152,), ".attn2.to_k": (1152,)},
)
"""PixArt alpha and sigma, which have the same modules."""

FAMILIES: Final = (PIXART,)
