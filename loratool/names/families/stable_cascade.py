"""Stable Cascade's prior: the names of adapters and of ComfyUI, and those of diffusers.

Its checkpoints fuse queries, keys and values in one parameter of PyTorch's attention; those who
adapt it have them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import CLIP_G, Family, Fusion, Row, single
from loratool.names.templates import expand
from loratool.names.vocabulary import Vocabulary

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["stable-cascade"],
    "segments": [
        "clf",
        "clip_img_mapper",
        "clip_txt_mapper",
        "clip_txt_pooled_mapper",
        "down_blocks",
        "down_downscalers",
        "embedding",
        "up_blocks",
        "up_upscalers",
    ],
}
"""How paths begin, in either naming."""

ENDS: Final = (
    *expand("{clip_txt_mapper,clip_txt_pooled_mapper,clip_img_mapper,embedding.1,clf.1}"),
    "down_downscalers.1.1.blocks.0",
    "up_upscalers.0.1.blocks.1",
)
"""Called alike, as all but the attention is."""

DEPTHS: Final = {"down_blocks": (8, 24), "up_blocks": (24, 8)}
"""How often each level repeats a convolution, a time step and an attention."""

CONVOLUTION: Final = {name: name for name in expand("depthwise", "channelwise.{0,4}")}
TIME_STEP: Final = {name: name for name in expand("mapper{,_sca,_crp}")}
ATTENTION: Final = {
    "kv_mapper.1": "kv_mapper.1",
    "attention.attn.to_q": "attention.to_q",
    "attention.attn.to_k": "attention.to_k",
    "attention.attn.to_v": "attention.to_v",
    "attention.attn.out_proj": "attention.to_out.0",
}
KINDS: Final = (CONVOLUTION, TIME_STEP, ATTENTION)


def rows() -> Iterator[Row]:
    """Yield the table."""
    for name in ENDS:
        yield single(name, name)
    for blocks, depths in DEPTHS.items():
        for level, depth in enumerate(depths):
            for number in range(depth * len(KINDS)):
                block = f"{blocks}.{level}.{number}"
                for native, hub in KINDS[number % len(KINDS)].items():
                    yield single(f"{block}.{native}", f"{block}.{hub}")


def fused_rows() -> Iterator[Row]:
    """Yield what its checkpoints have in one parameter."""
    for blocks, depths in DEPTHS.items():
        for level, depth in enumerate(depths):
            for number in range(KINDS.index(ATTENTION), depth * len(KINDS), len(KINDS)):
                block = f"{blocks}.{level}.{number}.attention"
                parts = tuple(f"{block}.to_{each}" for each in "qkv")
                yield Row(f"{block}.attn", Fusion(parts))


BLOCKS: Final = expand("{down_blocks,up_blocks}.*.*")

STABLE_CASCADE: Final = Family(
    "stable-cascade",
    "prior",
    tuple(rows()),
    Vocabulary((*ENDS, *(f"{b}.{hub}" for b in BLOCKS for kind in KINDS for hub in kind.values()))),
    Vocabulary(
        (
            *ENDS,
            *(f"{b}.{native}" for b in BLOCKS for kind in KINDS for native in kind),
            *(f"{b}.attention.attn" for b in BLOCKS),
        )
    ),
    tuple(fused_rows()),
    encoders={"text_encoder": CLIP_G},
)
"""Stable Cascade's larger prior (stage C)."""

FAMILIES: Final = (STABLE_CASCADE,)
