"""Chroma: Flux.1 with one network that makes all modulation, in the same two namings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import T5, Family, Row, same, single
from loratool.names.streams import merged_rows, stream_rows

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["chroma"],
    "segments": [
        "context_embedder",
        "distilled_guidance_layer",
        "double_blocks",
        "final_layer",
        "img_in",
        "proj_out",
        "single_blocks",
        "single_transformer_blocks",
        "transformer_blocks",
        "txt_in",
        "x_embedder",
    ],
}
"""How paths begin, in either naming."""

DOUBLE_BLOCKS: Final = 19
SINGLE_BLOCKS: Final = 38
GUIDANCE: Final = "distilled_guidance_layer"
GUIDANCE_LAYERS: Final = 5


def rows() -> Iterator[Row]:
    """Yield the table."""
    yield single("img_in", "x_embedder")
    yield single("txt_in", "context_embedder")
    yield single("final_layer.linear", "proj_out")
    yield same(f"{GUIDANCE}.in_proj")
    yield same(f"{GUIDANCE}.out_proj")
    yield same(f"{GUIDANCE}.norms.*", GUIDANCE_LAYERS)
    for native, hub in {"in_layer": "linear_1", "out_layer": "linear_2"}.items():
        layer = f"{GUIDANCE}.layers.*"
        yield single(f"{layer}.{native}", f"{layer}.{hub}", GUIDANCE_LAYERS)
    yield from stream_rows(DOUBLE_BLOCKS, is_modulated=False)
    yield from merged_rows(SINGLE_BLOCKS, is_modulated=False)


CHROMA: Final = Family(
    "chroma",
    "transformer",
    tuple(rows()),
    encoders={"text_encoder": T5},
    refines="flux",
)
"""Chroma1. What an adapter has of its blocks alone is the same in Flux.1, and taken for it."""

FAMILIES: Final = (CHROMA,)
