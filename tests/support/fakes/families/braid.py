"""A family of no real model, published under names of its own, with a fused projection."""

from __future__ import annotations

from loratool.names.family import CLIP_L, Family, Fusion, Release, Row, single

CLAIM = {"families": ["braid"], "segments": ["entry", "entrance", "strands", "strand_blocks"]}

BLOCKS = 4

BRAID = Family(
    "braid",
    "transformer",
    (
        single("entry", "entrance"),
        Row(
            "strands.*.mix.qkv",
            Fusion(tuple(f"strand_blocks.*.attn.to_{each}" for each in "qkv")),
            BLOCKS,
        ),
        single("strands.*.mix.out", "strand_blocks.*.attn.to_out.0", BLOCKS),
        single("strands.*.up", "strand_blocks.*.ff.net.0.proj", BLOCKS),
    ),
    encoders={"text_encoder": CLIP_L},
    releases=(Release("braid-1", "braid"),),
)

FAMILIES = (BRAID,)
