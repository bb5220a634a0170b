"""Z-Image: the names of its checkpoints for ComfyUI, which fuse projections, and its own.

Its own are those of diffusers; some of their modules have a hyphen in their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import Family, Fusion, Proportion, Row, same, single
from loratool.names.templates import expand

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["z-image"],
    "segments": [
        "all_final_layer",
        "all_x_embedder",
        "cap_embedder",
        "context_refiner",
        "final_layer",
        "layers",
        "noise_refiner",
        "t_embedder",
        "x_embedder",
    ],
}
"""How paths begin, in either naming."""

STACKS: Final = {"layers": 30, "noise_refiner": 2, "context_refiner": 2}
MODULATED: Final = ("layers", "noise_refiner")

ENDS: Final = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
ALIKE: Final = ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")

BLOCK: Final = {
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
}
BLOCK_ALIKE: Final = expand(
    "feed_forward.{w1,w2,w3}", "{attention_norm1,attention_norm2,ffn_norm1,ffn_norm2}"
)


def rows() -> Iterator[Row]:
    """Yield the table."""
    for native, hub in ENDS.items():
        yield single(native, hub)
    for name in ALIKE:
        yield same(name)
    for stack, count in STACKS.items():
        block = f"{stack}.*"
        parts = tuple(f"{block}.attention.to_{each}" for each in "qkv")
        yield Row(f"{block}.attention.qkv", Fusion(parts), count)
        for native, hub in BLOCK.items():
            yield single(f"{block}.{native}", f"{block}.{hub}", count)
        for name in BLOCK_ALIKE:
            yield same(f"{block}.{name}", count)
    for stack in MODULATED:
        yield same(f"{stack}.*.adaLN_modulation.0", STACKS[stack])


Z_IMAGE: Final = Family(
    "z-image",
    "transformer",
    tuple(rows()),
    # Lumina 2 has the same native names, fewer keys than queries and a wider feed-forward layer.
    proportions=(
        Proportion(".attention.qkv", 3.0, widens=True),
        Proportion(".feed_forward.w1", 8 / 3, widens=True),
        Proportion(".feed_forward.w2", 8 / 3, widens=False),
        Proportion(".feed_forward.w3", 8 / 3, widens=True),
    ),
    encoders={"text_encoder": "qwen3_4b"},
)
"""Z-Image, its Turbo and its editing model."""

FAMILIES: Final = (Z_IMAGE,)
