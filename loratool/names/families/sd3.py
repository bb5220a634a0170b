"""Stable Diffusion 3: Stability's names (MMDiT), which fuse projections, and those of diffusers.

The last block's context goes no further, so it has fewer modules there, and its modulation gives
(shift, scale) alone, which diffusers exchanges. Which block that is depends on the model's depth:
the models of 24 blocks and the one of 38 are two families.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import CLIP_G, CLIP_L, T5, Family, Fusion, Release, Row, single

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["sd3", "sd3-large"],
    "segments": [
        "context_embedder",
        "final_layer",
        "joint_blocks",
        "norm_out",
        "pos_embed",
        "proj_out",
        "t_embedder",
        "time_text_embed",
        "transformer_blocks",
        "x_embedder",
        "y_embedder",
    ],
}
"""How paths begin, in either naming."""

ENDS: Final = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}

BLOCK, HUB_BLOCK = "joint_blocks.*", "transformer_blocks.*"

EVERY_BLOCK: Final = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
}

MODULATION: Final = "context_block.adaLN_modulation.1", "norm1_context.linear"

BUT_THE_LAST: Final = {
    MODULATION[0]: MODULATION[1],
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}

DUAL: Final = {
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
}
"""The second attention that the first blocks of SD 3.5 medium have."""


def rows(depth: int, dual: int) -> Iterator[Row]:
    """Yield the table of a model.

    Args:
        depth: How many blocks it has.
        dual: How many of them, from the first on, have a second attention.
    """
    for native, hub in ENDS.items():
        yield single(native, hub)
    yield single("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)
    for names, count in ((EVERY_BLOCK, depth), (BUT_THE_LAST, depth - 1), (DUAL, dual)):
        for native, hub in names.items():
            yield single(f"{BLOCK}.{native}", f"{HUB_BLOCK}.{hub}", count)
    yield single(
        f"joint_blocks.{depth - 1}.{MODULATION[0]}",
        f"transformer_blocks.{depth - 1}.{MODULATION[1]}",
        swapped=True,
    )
    for native, pattern, count in (
        ("x_block.attn.qkv", "attn.to_{}", depth),
        ("context_block.attn.qkv", "attn.add_{}_proj", depth),
        ("x_block.attn2.qkv", "attn2.to_{}", dual),
    ):
        parts = tuple(f"{HUB_BLOCK}.{pattern.format(each)}" for each in "qkv")
        yield Row(f"{BLOCK}.{native}", Fusion(parts), count)


ENCODERS: Final = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5}
RELEASES: Final = (Release("sd3m", "stable-diffusion-3"),)

SD3: Final = Family(
    "sd3",
    "transformer",
    tuple(rows(depth=24, dual=13)),
    encoders=ENCODERS,
    releases=RELEASES,
    widths={".attn.to_q": (1536,), ".x_block.attn.qkv": (1536,)},
)
"""Stable Diffusion 3 medium and 3.5 medium."""

SD3_LARGE: Final = Family(
    "sd3-large",
    "transformer",
    tuple(rows(depth=38, dual=0)),
    hub_names=SD3.hub_names,
    native_names=SD3.native_names,
    encoders=ENCODERS,
    refines="sd3",
    releases=RELEASES,
    widths={".attn.to_q": (2432,), ".x_block.attn.qkv": (2432,)},
)
"""Stable Diffusion 3.5 large."""

FAMILIES: Final = (SD3, SD3_LARGE)
