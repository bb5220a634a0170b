"""Flux.1: Black Forest Labs' names, which fuse projections, and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import CLIP_L, T5, Family, Fusion, Proportion, Release, Row, single
from loratool.names.templates import expand
from loratool.names.vocabulary import Vocabulary

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["flux"],
    "segments": [
        "context_embedder",
        "distilled_guidance_layer",
        "double_blocks",
        "final_layer",
        "guidance_in",
        "img_in",
        "norm_out",
        "proj_out",
        "single_blocks",
        "single_transformer_blocks",
        "time_in",
        "time_text_embed",
        "transformer_blocks",
        "txt_in",
        "vector_in",
        "x_embedder",
    ],
}
"""How paths begin, in either naming."""

DOUBLE_BLOCKS: Final = 19
SINGLE_BLOCKS: Final = 38

DOUBLE: Final = "double_blocks.*", "transformer_blocks.*"
SINGLE: Final = "single_blocks.*", "single_transformer_blocks.*"

EMBEDDERS: Final = {
    "time_in": "timestep_embedder",
    "vector_in": "text_embedder",
    "guidance_in": "guidance_embedder",
}

STREAMS: Final = {
    "img_mod.lin": "norm1.linear",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mod.lin": "norm1_context.linear",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}

STREAM_FUSIONS: Final = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}

MERGED: Final = {
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}


def rows() -> Iterator[Row]:
    """Yield the table."""
    yield single("img_in", "x_embedder")
    yield single("txt_in", "context_embedder")
    for native, hub in EMBEDDERS.items():
        yield single(f"{native}.in_layer", f"time_text_embed.{hub}.linear_1")
        yield single(f"{native}.out_layer", f"time_text_embed.{hub}.linear_2")
    yield single("final_layer.linear", "proj_out")
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
    merged = expand(f"{hub_block}.{{attn.to_q,attn.to_k,attn.to_v,proj_mlp}}")
    yield Row(f"{block}.linear1", Fusion(merged, sizes="input", shares=(1, 1, 1, 4)), SINGLE_BLOCKS)


ROWS: Final = tuple(rows())

HUB_NAMES: Final = Vocabulary(
    (
        *(module for row in ROWS for module in row.hub.modules),
        *expand(
            "distilled_guidance_layer.{in_proj,out_proj}",
            "distilled_guidance_layer.layers.*.linear_{1,2}",
            "distilled_guidance_layer.norms.*",
        ),
    )
)
"""Names of diffusers' Flux of any depth, and of Chroma, which is built on it."""

NATIVE_NAMES: Final = Vocabulary(
    (
        *(row.native for row in ROWS),
        *expand(
            "distilled_guidance_layer.{in_proj,out_proj}",
            "distilled_guidance_layer.layers.*.{in_layer,out_layer}",
            "distilled_guidance_layer.norms.*",
        ),
    )
)
"""The same in the original naming."""

FLUX: Final = Family(
    "flux",
    "transformer",
    ROWS,
    HUB_NAMES,
    NATIVE_NAMES,
    encoders={"text_encoder": CLIP_L, "text_encoder_2": T5},
    releases=(Release("flux1", "flux-1-dev"),),
    # The feed-forward layers have four times the width of the model.
    proportions=(
        Proportion(".linear1", 7.0, widens=True),
        Proportion(".linear2", 5.0, widens=False),
        Proportion("_mlp.0", 4.0, widens=True),
        Proportion("_mlp.2", 4.0, widens=False),
    ),
)
"""Flux.1, dev and schnell, and what is built on it without new modules (Fill, Kontext)."""

FAMILIES: Final = (FLUX,)
