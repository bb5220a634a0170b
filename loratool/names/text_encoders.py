"""The names of the text encoders that diffusion models use."""

from __future__ import annotations

from typing import Final

from loratool.names.templates import expand

__all__ = ["CLIP_TEMPLATES", "T5_TEMPLATES"]

CLIP_TEMPLATES: Final = expand(
    "{text_model.,}embeddings.{token_embedding,position_embedding}",
    "{text_model.,}encoder.layers.*.self_attn.{q_proj,k_proj,v_proj,out_proj}",
    "{text_model.,}encoder.layers.*.mlp.{fc1,fc2}",
    "{text_model.,}encoder.layers.*.{layer_norm1,layer_norm2}",
    "{text_model.,}final_layer_norm",
    "text_projection",
)
"""CLIP's text model; transformers 5 dropped ``text_model`` where it is the whole model."""

T5_TEMPLATES: Final = expand(
    "shared",
    "lm_head",
    "{encoder,decoder}.{embed_tokens,final_layer_norm}",
    "{encoder,decoder}.block.*.layer.*.SelfAttention.{q,k,v,o,relative_attention_bias}",
    "{encoder,decoder}.block.*.layer.*.DenseReluDense.{wi,wi_0,wi_1,wo}",
    "{encoder,decoder}.block.*.layer.*.layer_norm",
    "decoder.block.*.layer.*.EncDecAttention.{q,k,v,o}",
)
