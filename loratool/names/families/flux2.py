"""Flux.2: Black Forest Labs' names, and those of diffusers.

Within the blocks the native names are those of Flux.1, but what they hold is not the same: the
feed-forward layers are gated, and diffusers leaves the first layer of a single block fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import Family, Fusion, Proportion, Row, single

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["flux2"],
    "segments": [
        "context_embedder",
        "double_blocks",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "final_layer",
        "guidance_in",
        "img_in",
        "norm_out",
        "proj_out",
        "single_blocks",
        "single_stream_modulation",
        "single_transformer_blocks",
        "time_guidance_embed",
        "time_in",
        "transformer_blocks",
        "txt_in",
        "x_embedder",
    ],
}
"""How paths begin, in either naming."""

DOUBLE_BLOCKS: Final = 8
SINGLE_BLOCKS: Final = 48

DOUBLE: Final = "double_blocks.*", "transformer_blocks.*"
SINGLE: Final = "single_blocks.*", "single_transformer_blocks.*"

ENDS: Final = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}

STREAMS: Final = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}

STREAM_FUSIONS: Final = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}

MERGED: Final = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}


def rows() -> Iterator[Row]:
    """Yield the table."""
    for native, hub in ENDS.items():
        yield single(native, hub)
    yield single("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)
    block, hub_block = DOUBLE
    for native, hub in STREAMS.items():
        yield single(f"{block}.{native}", f"{hub_block}.{hub}", DOUBLE_BLOCKS)
    for native, parts in STREAM_FUSIONS.items():
        fusion = Fusion(tuple(f"{hub_block}.{part}" for part in parts))
        yield Row(f"{block}.{native}", fusion, DOUBLE_BLOCKS)
    block, hub_block = SINGLE
    for native, hub in MERGED.items():
        yield single(f"{block}.{native}", f"{hub_block}.{hub}", SINGLE_BLOCKS)


FLUX2: Final = Family(
    "flux2",
    "transformer",
    tuple(rows()),
    # The feed-forward layers have three times the width of the model, twice for the gate.
    proportions=(
        Proportion(".linear1", 9.0, widens=True),
        Proportion(".linear2", 4.0, widens=False),
        Proportion("_mlp.0", 6.0, widens=True),
        Proportion("_mlp.2", 3.0, widens=False),
    ),
    encoders={"text_encoder": "mistral3_24b"},
)
"""Flux.2 dev, and the smaller klein, which has fewer of the same blocks."""

FAMILIES: Final = (FLUX2,)
