"""Hunyuan-DiT: the original names, which fuse projections, and those of diffusers.

The second half of its blocks take what the first half gave.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import Family, Fusion, Row, single

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["hunyuan-dit"],
    "segments": [
        "blocks",
        "extra_embedder",
        "final_layer",
        "mlp_t5",
        "norm_out",
        "pooler",
        "pos_embed",
        "proj_out",
        "style_embedder",
        "t_embedder",
        "text_embedder",
        "time_extra_emb",
        "x_embedder",
    ],
}
"""How paths begin, in either naming."""

BLOCKS: Final = 40
SKIPPING: Final = range(BLOCKS // 2 + 1, BLOCKS)

ENDS: Final = {
    "x_embedder.proj": "pos_embed.proj",
    "mlp_t5.0": "text_embedder.linear_1",
    "mlp_t5.2": "text_embedder.linear_2",
    "t_embedder.mlp.0": "time_extra_emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_extra_emb.timestep_embedder.linear_2",
    "extra_embedder.0": "time_extra_emb.extra_embedder.linear_1",
    "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2",
    "style_embedder": "time_extra_emb.style_embedder",
    **{f"pooler.{each}_proj": f"time_extra_emb.pooler.{each}_proj" for each in "qkvc"},
    "final_layer.linear": "proj_out",
}
"""The embedder of the style is in the first releases alone."""

BLOCK: Final = {
    "norm1": "norm1.norm",
    "default_modulation.1": "norm1.linear",
    "norm2": "norm3",
    "norm3": "norm2",  # numbered by place in the one naming, by what they precede in the other
    "attn1.out_proj": "attn1.to_out.0",
    "attn2.q_proj": "attn2.to_q",
    "attn2.out_proj": "attn2.to_out.0",
    **{
        f"{attention}.{each}_norm": f"{attention}.norm_{each}"
        for attention in ("attn1", "attn2")
        for each in "qk"
    },
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
FUSED: Final = {
    "attn1.Wqkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn2.kv_proj": ("attn2.to_k", "attn2.to_v"),
}
SKIP: Final = ("skip_norm", "skip_linear")


def rows() -> Iterator[Row]:
    """Yield the table."""
    for native, hub in ENDS.items():
        yield single(native, hub)
    yield single("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)
    for native, hub in BLOCK.items():
        yield single(f"blocks.*.{native}", f"blocks.*.{hub}", BLOCKS)
    for native, parts in FUSED.items():
        yield Row(f"blocks.*.{native}", Fusion(tuple(f"blocks.*.{p}" for p in parts)), BLOCKS)
    for number in SKIPPING:
        for name in SKIP:
            yield single(f"blocks.{number}.{name}", f"blocks.{number}.{name}")


HUNYUAN_DIT: Final = Family(
    "hunyuan-dit",
    "transformer",
    tuple(rows()),
    refines="wan",
    widths={".attn1.to_q": (1408,), ".attn2.to_k": (1024,)},
)
"""Hunyuan-DiT 1.0 to 1.2. In diffusers' names, its attention is called as that of Wan."""

FAMILIES: Final = (HUNYUAN_DIT,)
