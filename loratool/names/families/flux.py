"""Flux.1: Black Forest Labs' names, which fuse projections, and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import CLIP_L, T5, Family, Fusion, Proportion, Release, Row, single
from loratool.names.streams import merged_rows, stream_rows

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["flux"],
    "segments": [
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


def further_rows() -> Iterator[Row]:
    """Yield what ComfyUI calls the attention alone that a single block has in ``linear1``."""
    parts = tuple(f"single_transformer_blocks.*.attn.to_{each}" for each in "qkv")
    yield Row("single_blocks.*.linear1_qkv", Fusion(parts), SINGLE_BLOCKS)


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
