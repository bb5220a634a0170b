"""Flux.1: Black Forest Labs' names, which fuse projections, and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import CLIP_L, T5, Family, Fusion, Proportion, Release, Row, single
from loratool.names.streams import merged_rows, stream_rows
from loratool.names.templates import expand

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["flux"],
    "segments": [
        "blocks",
        "context_embedder",
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

EMBEDDERS: Final = {
    "time_in": "timestep_embedder",
    "vector_in": "text_embedder",
    "guidance_in": "guidance_embedder",
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
    yield from stream_rows(DOUBLE_BLOCKS)
    yield from merged_rows(SINGLE_BLOCKS)


DIFFSYNTH: Final = {
    "attn.a_to_out": "attn.to_out.0",
    "attn.b_to_out": "attn.to_add_out",
    "ff_a.0": "ff.net.0.proj",
    "ff_a.2": "ff.net.2",
    "ff_b.0": "ff_context.net.0.proj",
    "ff_b.2": "ff_context.net.2",
    "norm1_a.linear": "norm1.linear",
    "norm1_b.linear": "norm1_context.linear",
}
DIFFSYNTH_ATTENTIONS: Final = {"a": "attn.to_{}", "b": "attn.add_{}_proj"}
DIFFSYNTH_SINGLE: Final = {"norm.linear": "norm.linear", "proj_out": "proj_out"}


def further_rows() -> Iterator[Row]:
    """Yield the names of DiffSynth-Studio's own model, which stacks what the checkpoints do.

    ComfyUI has a name for the attention alone that a single block has in ``linear1``.
    """
    block, hub = "single_blocks.*", "single_transformer_blocks.*"
    attention = expand(f"{hub}.attn.{{to_q,to_k,to_v}}")
    merged = (*attention, f"{hub}.proj_mlp")
    fusion = Fusion(merged, sizes="input", shares=(1, 1, 1, 4))
    yield Row(f"{block}.to_qkv_mlp", fusion, SINGLE_BLOCKS)
    for native, name in DIFFSYNTH_SINGLE.items():
        yield single(f"{block}.{native}", f"{hub}.{name}", SINGLE_BLOCKS)
    block, hub = "blocks.*", "transformer_blocks.*"
    for native, name in DIFFSYNTH.items():
        yield single(f"{block}.{native}", f"{hub}.{name}", DOUBLE_BLOCKS)
    for stream, pattern in DIFFSYNTH_ATTENTIONS.items():
        parts = tuple(f"{hub}.{pattern.format(each)}" for each in "qkv")
        yield Row(f"{block}.attn.{stream}_to_qkv", Fusion(parts), DOUBLE_BLOCKS)
    yield Row("single_blocks.*.linear1_qkv", Fusion(attention), SINGLE_BLOCKS)


FLUX: Final = Family(
    "flux",
    "transformer",
    tuple(rows()),
    others=tuple(further_rows()),
    encoders={"text_encoder": CLIP_L, "text_encoder_2": T5},
    releases=(Release("flux1", "flux-1-dev"),),
    # The feed-forward layers have four times the width of the model.
    proportions=(
        Proportion(".linear1", 7.0, widens=True),
        Proportion(".linear2", 5.0, widens=False),
        Proportion("_mlp.0", 4.0, widens=True),
        Proportion("_mlp.2", 4.0, widens=False),
    ),
    widths={".attn.to_q": (3072,)},
)
"""Flux.1, dev and schnell, and what is built on it without new modules (Fill, Kontext, Krea)."""

FAMILIES: Final = (FLUX,)
