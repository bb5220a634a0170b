"""The names of the common language, vision and speech models of transformers."""

from __future__ import annotations

from typing import Final

from loratool.names.templates import expand
from loratool.names.text_encoders import CLIP_TEMPLATES, T5_TEMPLATES

__all__ = ["LANGUAGE_MODEL_TEMPLATES"]

DECODER: Final = (
    "{,model.,language_model.,model.language_model.,language_model.model.,model.text_model.}"
)
"""Where a decoder hangs: alone, under its head, or in a model of several modalities."""

LLAMA: Final = expand(
    DECODER + "{embed_tokens,norm,final_layernorm}",
    DECODER + "layers.*.self_attn.{q_proj,k_proj,v_proj,o_proj,qkv_proj,dense}",
    DECODER + "layers.*.self_attn.{q_norm,k_norm,q_layernorm,k_layernorm}",
    DECODER + "layers.*.self_attn.{q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj}",
    DECODER + "layers.*.self_attn.{q_a_layernorm,kv_a_layernorm}",
    DECODER + "layers.*.cross_attn.{q_proj,k_proj,v_proj,o_proj,q_norm,k_norm}",
    DECODER + "layers.*.linear_attn.{in_proj_qkvz,in_proj_ba,in_proj_qkv,in_proj_z}",
    DECODER + "layers.*.linear_attn.{in_proj_b,in_proj_a,out_proj,conv1d,norm}",
    DECODER + "layers.*.{mlp,feed_forward}.{gate_proj,up_proj,down_proj,gate_up_proj}",
    DECODER + "layers.*.mlp.{fc1,fc2,c_fc,c_proj}",
    DECODER + "layers.*.{input,post_attention,pre_feedforward,post_feedforward}_layernorm",
    DECODER + "layers.*.{post_mlp,post_self_attn}_layernorm",
)
"""Llama, Mistral, Qwen, Gemma, Phi, Granite, OLMo, Cohere, DeepSeek, GLM, StarCoder 2, …"""

EXPERTS: Final = expand(
    DECODER + "layers.*.{mlp,feed_forward}.{gate,router,experts,shared_expert_gate}",
    DECODER + "layers.*.mlp.experts.{gate_up_proj,down_proj}",
    DECODER + "layers.*.mlp.experts.*.{gate_proj,up_proj,down_proj,w1,w2,w3}",
    DECODER + "layers.*.{mlp,feed_forward}.shared_expert.{gate_proj,up_proj,down_proj}",
    DECODER + "layers.*.mlp.shared_experts.{gate_proj,up_proj,down_proj}",
    DECODER + "layers.*.block_sparse_moe.{gate,input_linear,output_linear}",
    DECODER + "layers.*.block_sparse_moe.experts.*.{w1,w2,w3}",
)
"""Mixtral, Qwen's mixtures of experts, DeepSeek, Llama 4, GPT-OSS, Granite, OLMoE, …"""

GPT: Final = expand(
    "{transformer.,}{wte,wpe,ln_f,norm_f,word_embeddings,word_embeddings_layernorm}",
    "{transformer.,}h.*.{ln_1,ln_2,ln_cross_attn,input_layernorm,post_attention_layernorm}",
    "{transformer.,}h.*.{ln_attn,ln_mlp}",
    "{transformer.,}h.*.attn.{c_attn,c_proj,q_attn}",
    "{transformer.,}h.*.crossattention.{c_attn,c_proj,q_attn}",
    "{transformer.,}h.*.attn.{q_proj,k_proj,v_proj,out_proj,qkv_proj}",
    "{transformer.,}h.*.attn.attention.{q_proj,k_proj,v_proj,out_proj}",
    "{transformer.,}h.*.self_attention.{query_key_value,dense}",
    "{transformer.,}h.*.mlp.{c_fc,c_proj,fc_in,fc_out,dense_h_to_4h,dense_4h_to_h}",
    "{transformer.,}blocks.*.{norm_1,norm_2,attn.Wqkv,attn.out_proj}",
    "{transformer.,}blocks.*.ffn.{up_proj,down_proj}",
    "{gpt_neox.,}{embed_in,final_layer_norm}",
    "{gpt_neox.,}layers.*.attention.{query_key_value,dense}",
    "{gpt_neox.,}layers.*.mlp.{dense_h_to_4h,dense_4h_to_h}",
    "{gpt_neox.,}layers.*.{input_layernorm,post_attention_layernorm}",
)
"""GPT-2, GPT-J, GPT-Neo, GPT-NeoX, GPTBigCode, CodeGen, BLOOM, Falcon, MPT."""

BERTS: Final = "{,bert.,roberta.,deberta.,electra.}"

BERT: Final = expand(
    BERTS + "embeddings.{word_embeddings,position_embeddings,token_type_embeddings,LayerNorm}",
    "{electra.,}embeddings_project",
    BERTS + "encoder.{rel_embeddings,LayerNorm}",
    BERTS + "encoder.layer.*.attention.self.{query,key,value}",
    BERTS + "encoder.layer.*.attention.self.{query_proj,key_proj,value_proj}",
    BERTS + "encoder.layer.*.{attention,crossattention}.output.{dense,LayerNorm}",
    BERTS + "encoder.layer.*.crossattention.self.{query,key,value}",
    BERTS + "encoder.layer.*.intermediate.dense",
    BERTS + "encoder.layer.*.output.{dense,LayerNorm}",
    BERTS + "pooler.dense",
    "{distilbert.,}embeddings.{word_embeddings,position_embeddings,LayerNorm}",
    "{distilbert.,}transformer.layer.*.attention.{q_lin,k_lin,v_lin,out_lin}",
    "{distilbert.,}transformer.layer.*.{ffn.lin1,ffn.lin2,sa_layer_norm,output_layer_norm}",
)
"""BERT, RoBERTa, XLM-RoBERTa, DeBERTa, ELECTRA, DistilBERT."""

BART: Final = expand(
    "{model.,}shared",
    "{model.,}{encoder,decoder}.{embed_tokens,embed_positions,layernorm_embedding}",
    "{model.,}{encoder,decoder}.{layer_norm,final_layer_norm,project_in,project_out}",
    "{model.,}encoder.{conv1,conv2}",
    "{model.,}{encoder,decoder}.layers.*.self_attn.{q_proj,k_proj,v_proj,out_proj}",
    "{model.,}{encoder,decoder}.layers.*.{fc1,fc2,self_attn_layer_norm,final_layer_norm}",
    "{model.,}decoder.layers.*.encoder_attn.{q_proj,k_proj,v_proj,out_proj}",
    "{model.,}decoder.layers.*.encoder_attn_layer_norm",
)
"""BART, OPT, Whisper."""

TOWERS: Final = "{,model.}{vision_tower.,vision_model.,vision_tower.vision_model.}"

VISION: Final = expand(
    "{vit.,}embeddings.patch_embeddings.projection",
    "{vit.,}layernorm",
    "{vit.,}layers.*.attention.{q_proj,k_proj,v_proj,o_proj}",
    "{vit.,}layers.*.{mlp.fc1,mlp.fc2,layernorm_before,layernorm_after}",
    "{vit.,}encoder.layer.*.attention.attention.{query,key,value}",
    "{vit.,}encoder.layer.*.{attention.output.dense,intermediate.dense,output.dense}",
    "{vit.,}encoder.layer.*.{layernorm_before,layernorm_after}",
    "{dinov2.,}encoder.layer.*.attention.{q_proj,k_proj,v_proj,o_proj}",
    "{dinov2.,}encoder.layer.*.{mlp.fc1,mlp.fc2,norm1,norm2}",
    TOWERS + "embeddings.{patch_embedding,position_embedding}",
    TOWERS + "encoder.layers.*.self_attn.{q_proj,k_proj,v_proj,out_proj}",
    TOWERS + "encoder.layers.*.{mlp.fc1,mlp.fc2,layer_norm1,layer_norm2}",
    TOWERS + "{pre_layrnorm,post_layernorm}",
    "{model.,}visual.blocks.*.attn.{qkv,proj}",
    "{model.,}visual.blocks.*.{mlp.fc1,mlp.fc2,norm1,norm2}",
    "{model.,}visual.blocks.*.mlp.{gate_proj,up_proj,down_proj}",
    "{model.,}visual.{patch_embed.proj,merger.mlp.0,merger.mlp.2,merger.ln_q}",
    "{model.,}multi_modal_projector.linear_{1,2}",
    "visual_projection",
)
"""ViT (of either version of transformers), DINOv2, and the towers of multimodal models."""

HEADS: Final = expand(
    "{,language_model.}lm_head",
    "lm_head.{dense,decoder,layer_norm}",
    "{embed_out,proj_out,score,classifier,pre_classifier,qa_outputs}",
    "classifier.{dense,out_proj}",
    "cls.predictions.{decoder,transform.dense,transform.LayerNorm}",
    "{vocab_transform,vocab_projector,vocab_layer_norm}",
)

LANGUAGE_MODEL_TEMPLATES: Final = (
    *LLAMA,
    *EXPERTS,
    *GPT,
    *BERT,
    *BART,
    *VISION,
    *HEADS,
    *CLIP_TEMPLATES,
    *T5_TEMPLATES,
)
