"""Qwen-Image, which was published in the naming of diffusers."""

from __future__ import annotations

from typing import Final

from loratool.names.family import Family
from loratool.names.templates import expand
from loratool.names.vocabulary import Vocabulary

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": [],
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

NAMES: Final = expand(
    "{img_in,txt_in,txt_norm,norm_out.linear,proj_out}",
    "time_text_embed.timestep_embedder.linear_{1,2}",
    "transformer_blocks.*.attn.{to_q,to_k,to_v,to_out.0}",
    "transformer_blocks.*.attn.{add_q_proj,add_k_proj,add_v_proj,to_add_out}",
    "transformer_blocks.*.attn.{norm_q,norm_k,norm_added_q,norm_added_k}",
    "transformer_blocks.*.{img_mlp,txt_mlp}.{net.0.proj,net.2}",
    "transformer_blocks.*.{img_mod,txt_mod}.1",
)

FAMILIES: Final = (Family("qwen-image", "transformer", hub_names=Vocabulary(NAMES)),)
