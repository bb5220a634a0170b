"""CogVideoX, which is used in the naming of diffusers alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import T5, Family, Row, single
from loratool.names.templates import expand

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["cogvideox"],
    "segments": [
        "norm_final",
        "norm_out",
        "ofs_embedding",
        "patch_embed",
        "proj_out",
        "time_embedding",
        "transformer_blocks",
    ],
}
"""How paths begin."""

BLOCKS: Final = 42

ENDS: Final = expand(
    "patch_embed.{proj,text_proj}",
    "{time_embedding,ofs_embedding}.linear_{1,2}",
    "{norm_final,norm_out.linear,norm_out.norm,proj_out}",
)
"""The second embedding is in CogVideoX 1.5 alone, for what begins from an image."""

BLOCK: Final = expand(
    "attn1.{norm_q,norm_k,to_q,to_k,to_v,to_out.0}",
    "{norm1,norm2}.{linear,norm}",
    "ff.{net.0.proj,net.2}",
)


def rows() -> Iterator[Row]:
    """Yield the table, in which both namings are the same."""
    for name in ENDS:
        yield single(name, name)
    for inner in BLOCK:
        yield single(f"transformer_blocks.*.{inner}", f"transformer_blocks.*.{inner}", BLOCKS)


COGVIDEOX: Final = Family(
    "cogvideox",
    "transformer",
    tuple(rows()),
    encoders={"text_encoder": T5},
    depths=(30,),
    widths={".attn1.to_q": (1920, 3072)},
)
"""CogVideoX and CogVideoX 1.5; the smaller model has fewer of the same blocks."""

FAMILIES: Final = (COGVIDEOX,)
