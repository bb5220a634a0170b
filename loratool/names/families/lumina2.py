"""Lumina-Image 2: the original names, which fuse projections, and those of diffusers.

Three heads of queries share one of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import Family, Fusion, Proportion, Row, same, single

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["lumina2"],
    "segments": [
        "cap_embedder",
        "context_refiner",
        "final_layer",
        "layers",
        "noise_refiner",
        "norm_out",
        "t_embedder",
        "time_caption_embed",
        "x_embedder",
    ],
}
"""How paths begin, in either naming."""

STACKS: Final = {"layers": 26, "noise_refiner": 2, "context_refiner": 2}
UNMODULATED: Final = "context_refiner"

EMBED: Final = "time_caption_embed"
ENDS: Final = {
    "t_embedder.mlp.0": f"{EMBED}.timestep_embedder.linear_1",
    "t_embedder.mlp.2": f"{EMBED}.timestep_embedder.linear_2",
    "cap_embedder.0": f"{EMBED}.caption_embedder.0",
    "cap_embedder.1": f"{EMBED}.caption_embedder.1",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}

BLOCK: Final = {
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "attention_norm2": "norm2",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
}
MODULATED: Final = {"adaLN_modulation.1": "norm1.linear", "attention_norm1": "norm1.norm"}


def rows() -> Iterator[Row]:
    """Yield the table."""
    yield same("x_embedder")
    for native, hub in ENDS.items():
        yield single(native, hub)
    for stack, count in STACKS.items():
        block = f"{stack}.*"
        parts = tuple(f"{block}.attn.to_{each}" for each in "qkv")
        yield Row(f"{block}.attention.qkv", Fusion(parts, "grouped", shares=(3, 1, 1)), count)
        first = {"attention_norm1": "norm1"} if stack == UNMODULATED else MODULATED
        for native, hub in (BLOCK | first).items():
            yield single(f"{block}.{native}", f"{block}.{hub}", count)


LUMINA2: Final = Family(
    "lumina2",
    "transformer",
    tuple(rows()),
    proportions=(
        Proportion(".attention.qkv", 5 / 3, widens=True),
        Proportion(".feed_forward.w1", 4.0, widens=True),
        Proportion(".feed_forward.w2", 4.0, widens=False),
        Proportion(".feed_forward.w3", 4.0, widens=True),
    ),
    encoders={"text_encoder": "gemma2_2b"},
)
"""Lumina-Image 2.0, and what is built on it (Neta Lumina)."""

FAMILIES: Final = (LUMINA2,)
