"""Qwen-Image and its editing models, which were published in the naming of diffusers."""

from __future__ import annotations

from typing import Final

from loratool.names.family import Family, same
from loratool.names.templates import expand

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["qwen-image"],
    "segments": [
        "img_in",
        "norm_out",
        "proj_out",
        "time_text_embed",
        "transformer_blocks",
        "txt_in",
        "txt_norm",
    ],
}
"""How paths begin, in either naming."""

BLOCKS: Final = 60

ENDS: Final = expand(
    "{img_in,txt_in,txt_norm,norm_out.linear,proj_out}",
    "time_text_embed.timestep_embedder.linear_{1,2}",
    "time_text_embed.addition_t_embedding",
)
"""The last one is an embedding that Qwen-Image-Layered has."""

BLOCK: Final = expand(
    "transformer_blocks.*.attn.{to_q,to_k,to_v,to_out.0}",
    "transformer_blocks.*.attn.{add_q_proj,add_k_proj,add_v_proj,to_add_out}",
    "transformer_blocks.*.attn.{norm_q,norm_k,norm_added_q,norm_added_k}",
    "transformer_blocks.*.{img_mlp,txt_mlp}.{net.0.proj,net.2}",
    "transformer_blocks.*.{img_mod,txt_mod}.1",
)

QWEN_IMAGE: Final = Family(
    "qwen-image",
    "transformer",
    (*(same(name) for name in ENDS), *(same(name, BLOCKS) for name in BLOCK)),
    encoders={"text_encoder": "qwen25_7b"},
    widths={".attn.to_q": (3072,)},
)
"""Qwen-Image, -Edit (2509, 2511) and -Layered."""

FAMILIES: Final = (QWEN_IMAGE,)
