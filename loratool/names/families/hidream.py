"""HiDream-I1, which was published in the naming of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import CLIP_G, CLIP_L, T5, Family, Row, same
from loratool.names.templates import expand

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["hidream"],
    "segments": [
        "caption_projection",
        "double_stream_blocks",
        "final_layer",
        "p_embedder",
        "single_stream_blocks",
        "t_embedder",
        "x_embedder",
    ],
}
"""How paths begin, in either naming."""

DOUBLE_BLOCKS: Final = 16
SINGLE_BLOCKS: Final = 32
CAPTIONS: Final = DOUBLE_BLOCKS + SINGLE_BLOCKS + 1
"""Each block has a projection of what a layer of the language model says; T5's is the last."""

ENDS: Final = expand(
    "x_embedder.proj",
    "t_embedder.timestep_embedder.linear_{1,2}",
    "p_embedder.pooled_embedder.linear_{1,2}",
    "final_layer.{linear,adaLN_modulation.1}",
)

BLOCK: Final = expand(
    "block.adaLN_modulation.1",
    "block.attn1.{to_q,to_k,to_v,to_out,q_rms_norm,k_rms_norm}",
    "block.ff_i.gate",
    "block.ff_i.{shared_experts,experts.0,experts.1,experts.2,experts.3}.{w1,w2,w3}",
)
TEXT: Final = expand(
    "block.attn1.{to_q_t,to_k_t,to_v_t,to_out_t,q_rms_norm_t,k_rms_norm_t}",
    "block.ff_t.{w1,w2,w3}",
)


def rows() -> Iterator[Row]:
    """Yield the table."""
    for name in ENDS:
        yield same(name)
    yield same("caption_projection.*.linear", CAPTIONS)
    for name in (*BLOCK, *TEXT):
        yield same(f"double_stream_blocks.*.{name}", DOUBLE_BLOCKS)
    for name in BLOCK:
        yield same(f"single_stream_blocks.*.{name}", SINGLE_BLOCKS)


HIDREAM: Final = Family(
    "hidream",
    "transformer",
    tuple(rows()),
    encoders={
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "text_encoder_3": T5,
        "text_encoder_4": "llama",
    },
)
"""HiDream-I1, full, dev and fast, and its editing model E1."""

FAMILIES: Final = (HIDREAM,)
