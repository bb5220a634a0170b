"""What llama.cpp calls the modules of each architecture, and which models are of which.

A line of a table is a module of transformers, the tensor that it is, and what becomes of its
rows (:data:`~loratool.names.gguf.rows.FORMS`). ``*`` is a layer and ``#`` an expert. The first
line of a tensor is what reading it means.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

__all__ = ["ARCHITECTURES", "CLASSES", "MODEL_TYPES", "REFUSED", "Line"]

Line = tuple[str, str, str]

L: Final = "model.layers.*."


def _lines(text: str, layer: str = L, block: str = "blk.*.") -> tuple[Line, ...]:
    """Return the lines of a table; those that begin with a point are in a layer."""
    return tuple(_read(text, layer, block))


def _read(text: str, layer: str, block: str) -> Iterator[Line]:
    for line in text.strip().splitlines():
        module, tensor, *form = line.split(maxsplit=2)
        inside = module.startswith(".")
        yield (
            layer + module[1:] if inside else module,
            block + tensor if inside else tensor,
            form[0] if form else "",
        )


def _of(*tables: tuple[Line, ...], without: str = "", **forms: str) -> tuple[Line, ...]:
    """Return tables as one, with other forms for some tensors, and without others."""
    gone = without.split()
    made = []
    for module, tensor, form in (line for table in tables for line in table):
        leaf = tensor.rpartition(".")[2]
        if leaf not in gone:
            made.append((module, tensor, forms.get(leaf, form)))
    return tuple(made)


ENDS: Final = _lines("""
model.embed_tokens token_embd
model.norm output_norm
lm_head output
""")
ATTENTION: Final = _lines("""
.self_attn.q_proj attn_q
.self_attn.k_proj attn_k
.self_attn.v_proj attn_v
.self_attn.o_proj attn_output
""")
QK_NORMS: Final = _lines("""
.self_attn.q_norm attn_q_norm
.self_attn.k_norm attn_k_norm
""")
NORMS: Final = _lines("""
.input_layernorm attn_norm
.post_attention_layernorm ffn_norm
""")
GATED: Final = _lines("""
.mlp.gate_proj ffn_gate
.mlp.up_proj ffn_up
.mlp.down_proj ffn_down
""")
FUSED_EXPERTS: Final = _lines("""
.mlp.experts.gate_up_proj ffn_gate_exps first half
.mlp.experts.gate_up_proj ffn_up_exps second half
.mlp.experts.down_proj ffn_down_exps
""")
EXPERTS: Final = (
    *_lines("""
.mlp.gate ffn_gate_inp
.mlp.experts.#.gate_proj ffn_gate_exps
.mlp.experts.#.up_proj ffn_up_exps
.mlp.experts.#.down_proj ffn_down_exps
"""),
    *FUSED_EXPERTS,
)
MIXTRAL: Final = (
    *_lines("""
.block_sparse_moe.gate ffn_gate_inp
.block_sparse_moe.experts.#.w1 ffn_gate_exps
.block_sparse_moe.experts.#.w3 ffn_up_exps
.block_sparse_moe.experts.#.w2 ffn_down_exps
"""),
    *EXPERTS,
)
SHARED_EXPERTS: Final = _lines("""
.mlp.shared_experts.gate_proj ffn_gate_shexp
.mlp.shared_experts.up_proj ffn_up_shexp
.mlp.shared_experts.down_proj ffn_down_shexp
""")
SHARED_EXPERT: Final = _lines("""
.mlp.shared_expert_gate ffn_gate_inp_shexp
.mlp.shared_expert.gate_proj ffn_gate_shexp
.mlp.shared_expert.up_proj ffn_up_shexp
.mlp.shared_expert.down_proj ffn_down_shexp
""")
MLA: Final = _lines("""
.self_attn.q_a_proj attn_q_a
.self_attn.q_b_proj attn_q_b
.self_attn.kv_a_proj_with_mqa attn_kv_a_mqa
.self_attn.kv_b_proj attn_kv_b
.self_attn.q_a_layernorm attn_q_a_norm
.self_attn.kv_a_layernorm attn_kv_a_norm
""")
POST_NORMS: Final = _lines("""
.post_attention_layernorm post_attention_norm
.post_feedforward_layernorm post_ffw_norm
""")

QWEN: Final = (*ENDS, *ATTENTION, *NORMS, *GATED)
QWEN_MOE: Final = (*ENDS, *ATTENTION, *NORMS, *EXPERTS)
LLAMA: Final = _of(QWEN, attn_q="queries", attn_k="keys")
COHERE: Final = _of(QWEN, without="output ffn_norm")
GEMMA: Final = (*ENDS[:2], *ATTENTION, *GATED)
GEMMA_2: Final = (
    *GEMMA,
    *_lines("""
.input_layernorm attn_norm
.pre_feedforward_layernorm ffn_norm
"""),
    *POST_NORMS,
)
GRANITE_MOE: Final = _lines("""
.block_sparse_moe.router.layer ffn_gate_inp
.block_sparse_moe.input_linear ffn_gate_exps first half
.block_sparse_moe.input_linear ffn_up_exps second half
.block_sparse_moe.output_linear ffn_down_exps
.shared_mlp.input_linear ffn_gate_shexp first half
.shared_mlp.input_linear ffn_up_shexp second half
.shared_mlp.output_linear ffn_down_shexp
""")
GRANITE_DENSE: Final = _lines("""
.shared_mlp.input_linear ffn_gate first half
.shared_mlp.input_linear ffn_up second half
.shared_mlp.output_linear ffn_down
""")
BAICHUAN: Final = _lines("""
.self_attn.W_pack attn_q first third
.self_attn.W_pack attn_k second third
.self_attn.W_pack attn_v last third
.self_attn.o_proj attn_output
""")
INTERNLM_2: Final = _lines("""
model.tok_embeddings token_embd
model.norm output_norm
output output
.attention.wqkv attn_q queries of groups
.attention.wqkv attn_k keys of groups
.attention.wqkv attn_v values of groups
.attention.wo attn_output
.attention_norm attn_norm
.ffn_norm ffn_norm
.feed_forward.w1 ffn_gate
.feed_forward.w3 ffn_up
.feed_forward.w2 ffn_down
""")
ERNIE: Final = (
    *QWEN,
    *_lines("""
.self_attn.qkv_proj attn_q queries below
.self_attn.qkv_proj attn_k keys below
.self_attn.qkv_proj attn_v values below
.mlp.up_gate_proj ffn_gate first half
.mlp.up_gate_proj ffn_up second half
"""),
)
PHI_2: Final = _lines("""
model.embed_tokens token_embd
model.final_layernorm output_norm
lm_head output
.input_layernorm attn_norm
.self_attn.q_proj attn_q
.self_attn.k_proj attn_k
.self_attn.v_proj attn_v
.self_attn.dense attn_output
.mlp.fc1 ffn_up
.mlp.fc2 ffn_down
""")
FUSED_QKV: Final = _lines("""
.self_attn.qkv_proj attn_qkv
.self_attn.o_proj attn_output
""")
FUSED_GATE: Final = _lines("""
.mlp.gate_up_proj ffn_up
.mlp.down_proj ffn_down
""")
GPT_OSS: Final = (
    *ENDS,
    *ATTENTION,
    *_lines("""
.input_layernorm attn_norm
.post_attention_layernorm post_attention_norm
.mlp.router ffn_gate_inp
.mlp.experts.gate_up_proj ffn_gate_exps even
.mlp.experts.gate_up_proj ffn_up_exps odd
.mlp.experts.down_proj ffn_down_exps
"""),
)
LLAMA_4: Final = (
    *ENDS,
    *ATTENTION,
    *NORMS,
    *_lines("""
.feed_forward.gate_proj ffn_gate
.feed_forward.up_proj ffn_up
.feed_forward.down_proj ffn_down
.feed_forward.router ffn_gate_inp
.feed_forward.shared_expert.gate_proj ffn_gate_shexp
.feed_forward.shared_expert.up_proj ffn_up_shexp
.feed_forward.shared_expert.down_proj ffn_down_shexp
.feed_forward.experts.gate_up_proj ffn_gate_exps first half
.feed_forward.experts.gate_up_proj ffn_up_exps second half
.feed_forward.experts.down_proj ffn_down_exps
"""),
)
GLM_4: Final = (
    *ENDS,
    *ATTENTION,
    *FUSED_GATE,
    *_lines("""
.input_layernorm attn_norm
.post_self_attn_layernorm post_attention_norm
.post_attention_layernorm ffn_norm
.post_mlp_layernorm post_ffw_norm
"""),
)
CHATGLM: Final = (
    *_lines(
        """
transformer.embedding.word_embeddings token_embd
transformer.encoder.final_layernorm output_norm
transformer.output_layer output
.input_layernorm attn_norm
.post_attention_layernorm ffn_norm
.self_attention.query_key_value attn_qkv
.self_attention.dense attn_output
.mlp.dense_h_to_4h ffn_up
.mlp.dense_4h_to_h ffn_down
""",
        "transformer.encoder.layers.*.",
    ),
    *_of(ENDS, ATTENTION, NORMS, FUSED_GATE),
)
GPT_2: Final = _lines(
    """
transformer.wte token_embd
transformer.wpe position_embd
transformer.ln_f output_norm
lm_head output
.ln_1 attn_norm
.ln_2 ffn_norm
.attn.c_attn attn_qkv
.attn.c_proj attn_output
.mlp.c_fc ffn_up
.mlp.c_proj ffn_down
""",
    "transformer.h.*.",
)
BLOOM: Final = _lines(
    """
transformer.word_embeddings token_embd
transformer.word_embeddings_layernorm token_embd_norm
transformer.ln_f output_norm
lm_head output
.input_layernorm attn_norm
.post_attention_layernorm ffn_norm
.self_attention.query_key_value attn_qkv sorted
.self_attention.dense attn_output
.mlp.dense_h_to_4h ffn_up
.mlp.dense_4h_to_h ffn_down
""",
    "transformer.h.*.",
)
NEOX: Final = _lines(
    """
gpt_neox.embed_in token_embd
gpt_neox.final_layer_norm output_norm
embed_out output
.input_layernorm attn_norm
.post_attention_layernorm ffn_norm
.attention.query_key_value attn_qkv sorted
.attention.dense attn_output
.mlp.dense_h_to_4h ffn_up
.mlp.dense_4h_to_h ffn_down
""",
    "gpt_neox.layers.*.",
)
FALCON: Final = _lines(
    """
transformer.word_embeddings token_embd
transformer.ln_f output_norm
lm_head output
.input_layernorm attn_norm
.ln_mlp attn_norm
.ln_attn attn_norm_2
.self_attention.query_key_value attn_qkv sorted by group
.self_attention.dense attn_output
.mlp.dense_h_to_4h ffn_up
.mlp.dense_4h_to_h ffn_down
""",
    "transformer.h.*.",
)
MPT: Final = _lines(
    """
transformer.wte token_embd
transformer.norm_f output_norm
lm_head output
.norm_1 attn_norm
.norm_2 ffn_norm
.attn.Wqkv attn_qkv
.attn.out_proj attn_output
.ffn.up_proj ffn_up
.ffn.down_proj ffn_down
""",
    "transformer.blocks.*.",
)
EXAONE: Final = _lines(
    """
transformer.wte token_embd
transformer.ln_f output_norm
lm_head output
.ln_1 attn_norm
.ln_2 ffn_norm
.attn.attention.q_proj attn_q
.attn.attention.k_proj attn_k
.attn.attention.v_proj attn_v
.attn.attention.out_proj attn_output
.mlp.c_fc_0 ffn_gate
.mlp.c_fc_1 ffn_up
.mlp.c_proj ffn_down
""",
    "transformer.h.*.",
)
STARCODER_2: Final = (
    *ENDS,
    *ATTENTION,
    *NORMS,
    *_lines("""
.mlp.c_fc ffn_up
.mlp.c_proj ffn_down
"""),
)
UNGATED: Final = _of(GATED, without="ffn_gate")
HYBRID: Final = _lines("""
.linear_attn.out_proj ssm_out
""")
MAMBA: Final = _lines("""
.mamba.in_proj ssm_in
.mamba.out_proj ssm_out
""")

ARCHITECTURES: Final[dict[str, tuple[Line, ...]]] = {
    "llama": (*LLAMA, *MIXTRAL),
    "mistral3": (*LLAMA, *MIXTRAL),
    "smollm3": LLAMA,
    "arcee": _of(LLAMA, without="ffn_gate"),
    "granite": (*LLAMA, *GRANITE_DENSE),
    "granitemoe": (*_of(LLAMA, without="ffn_gate ffn_up ffn_down"), *GRANITE_MOE),
    "granitehybrid": (
        *_of(LLAMA, without="ffn_gate ffn_up ffn_down"),
        *GRANITE_MOE,
        *GRANITE_DENSE,
        *MAMBA,
    ),
    "deci": LLAMA,
    "minicpm": LLAMA,
    "olmo": _of(LLAMA, without="attn_norm ffn_norm output_norm"),
    "xverse": _of(QWEN, attn_q="queries", attn_k="keys by group"),
    "deepseek": (*LLAMA, *EXPERTS, *SHARED_EXPERTS),
    "baichuan": (*ENDS, *NORMS, *GATED, *BAICHUAN),
    "internlm2": INTERNLM_2,
    "llama4": LLAMA_4,
    "qwen": _lines(
        """
transformer.wte token_embd
transformer.ln_f output_norm
lm_head output
.ln_1 attn_norm
.ln_2 ffn_norm
.attn.c_attn attn_qkv
.attn.c_proj attn_output
.mlp.w2 ffn_gate
.mlp.w1 ffn_up
.mlp.c_proj ffn_down
""",
        "transformer.h.*.",
    ),
    "qwen2": QWEN,
    "qwen2vl": QWEN,
    "qwen3": (*QWEN, *QK_NORMS),
    "qwen3vl": (*QWEN, *QK_NORMS),
    "qwen2moe": (*QWEN_MOE, *SHARED_EXPERT),
    "qwen3moe": (*QWEN_MOE, *QK_NORMS),
    "qwen3vlmoe": (*QWEN_MOE, *QK_NORMS),
    "qwen3next": (
        *_of(QWEN_MOE, QK_NORMS, SHARED_EXPERT, without="ffn_norm"),
        POST_NORMS[0],
        *HYBRID,
    ),
    "qwen35": (*_of(QWEN, QK_NORMS, without="ffn_norm"), POST_NORMS[0]),
    "qwen35moe": (
        *_of(QWEN_MOE, QK_NORMS, SHARED_EXPERT, without="ffn_norm"),
        POST_NORMS[0],
    ),
    "phi2": PHI_2,
    "phi3": (*ENDS, *NORMS, *FUSED_QKV, *FUSED_GATE),
    "phimoe": (*ENDS, *ATTENTION, *NORMS, *MIXTRAL),
    "starcoder": GPT_2,
    "starcoder2": STARCODER_2,
    "command-r": (*COHERE, *QK_NORMS),
    "cohere2": COHERE,
    "olmo2": (*_of(QWEN, QK_NORMS, without="attn_norm ffn_norm"), *POST_NORMS),
    "olmoe": (*QWEN_MOE, *QK_NORMS),
    "seed_oss": (*_of(QWEN, without="ffn_norm"), POST_NORMS[0]),
    "orion": QWEN,
    "minicpm3": _of(QWEN, MLA, without="attn_q attn_k attn_v"),
    "deepseek2": _of(QWEN, MLA, EXPERTS, SHARED_EXPERTS, without="attn_k attn_v"),
    "ernie4_5": ERNIE,
    "ernie4_5-moe": (*ERNIE, *EXPERTS, *SHARED_EXPERTS),
    "gpt-oss": GPT_OSS,
    "chatglm": CHATGLM,
    "glm4": GLM_4,
    "glm4moe": (
        *_of(QWEN, QK_NORMS, EXPERTS, SHARED_EXPERTS, without="ffn_norm"),
        POST_NORMS[0],
    ),
    "gemma": (*GEMMA, *NORMS),
    "gemma2": GEMMA_2,
    "gemma3": (*GEMMA_2, ENDS[2], *QK_NORMS),
    "gemma3n": (*GEMMA_2, *QK_NORMS),
    "nemotron": (*ENDS, *ATTENTION, *NORMS, *UNGATED),
    "stablelm": QWEN,
    "exaone": EXAONE,
    "exaone4": (
        *_of(QWEN, QK_NORMS, without="attn_norm ffn_norm"),
        *POST_NORMS,
    ),
    "gpt2": GPT_2,
    "bloom": BLOOM,
    "gptneox": NEOX,
    "falcon": FALCON,
    "mpt": MPT,
}
"""The tables by ``general.architecture``."""

WEIGHTS_ONLY: Final = frozenset(("minicpm", "olmo"))
"""Where rows of weights are paired and biases are not."""
TURNED_EXPERTS: Final = frozenset(("llama4", "gpt-oss"))
"""Where transformers stores stacks of experts as ``(experts, in, out)``."""

_MLA: Final = "is cut by heads and turned in part, and no pair of factors is that"
_LINEAR: Final = "has rows that are sorted by the heads of its states, which is not supported"
REFUSED: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "deepseek2": ((r"self_attn\.kv_b_proj$", _MLA),),
    "qwen3next": ((r"linear_attn\.in_proj_\w+$", _LINEAR),),
    "qwen35": ((r"linear_attn\.(in_proj_\w+|out_proj)$", _LINEAR),),
    "qwen35moe": ((r"linear_attn\.(in_proj_\w+|out_proj)$", _LINEAR),),
}
"""Modules that a file of the architecture has, but not as the rows of a pair: why not."""

CLASSES: Final[dict[str, str]] = {
    name: architecture
    for architecture, names in {
        "llama": "LlamaForCausalLM LLaMAForCausalLM LlamaModel MistralForCausalLM MistralModel "
        "MixtralForCausalLM InternLM3ForCausalLM VLlama3ForCausalLM IQuestCoderForCausalLM "
        "LlavaForConditionalGeneration VoxtralForConditionalGeneration",
        "llama4": "Llama4ForCausalLM Llama4ForConditionalGeneration",
        "mistral3": "Mistral3ForConditionalGeneration Ministral3ForCausalLM",
        "smollm3": "SmolLM3ForCausalLM",
        "arcee": "ArceeForCausalLM",
        "granite": "GraniteForCausalLM",
        "granitemoe": "GraniteMoeForCausalLM GraniteMoeSharedForCausalLM",
        "granitehybrid": "GraniteMoeHybridForCausalLM",
        "deci": "DeciLMForCausalLM",
        "minicpm": "MiniCPMForCausalLM",
        "minicpm3": "MiniCPM3ForCausalLM",
        "olmo": "OlmoForCausalLM OLMoForCausalLM",
        "olmo2": "Olmo2ForCausalLM Olmo3ForCausalLM",
        "olmoe": "OlmoeForCausalLM",
        "seed_oss": "SeedOssForCausalLM",
        "orion": "OrionForCausalLM",
        "xverse": "XverseForCausalLM",
        "deepseek": "DeepseekForCausalLM",
        "deepseek2": "DeepseekV2ForCausalLM DeepseekV3ForCausalLM",
        "baichuan": "BaichuanForCausalLM BaiChuanForCausalLM",
        "internlm2": "InternLM2ForCausalLM",
        "qwen": "QWenLMHeadModel",
        "qwen2": "Qwen2ForCausalLM Qwen2Model",
        "qwen2vl": "Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration",
        "qwen2moe": "Qwen2MoeForCausalLM",
        "qwen3": "Qwen3ForCausalLM Qwen3Model",
        "qwen3moe": "Qwen3MoeForCausalLM",
        "qwen3vl": "Qwen3VLForConditionalGeneration",
        "qwen3vlmoe": "Qwen3VLMoeForConditionalGeneration",
        "qwen3next": "Qwen3NextForCausalLM",
        "qwen35": "Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration",
        "qwen35moe": "Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration",
        "phi2": "PhiForCausalLM",
        "phi3": "Phi3ForCausalLM",
        "phimoe": "PhiMoEForCausalLM PhimoeForCausalLM",
        "starcoder": "GPTBigCodeForCausalLM",
        "starcoder2": "Starcoder2ForCausalLM",
        "command-r": "CohereForCausalLM",
        "cohere2": "Cohere2ForCausalLM",
        "ernie4_5": "Ernie4_5ForCausalLM Ernie4_5_ForCausalLM",
        "ernie4_5-moe": "Ernie4_5_MoeForCausalLM",
        "gpt-oss": "GptOssForCausalLM",
        "chatglm": "GlmForCausalLM ChatGLMModel ChatGLMForConditionalGeneration",
        "glm4": "Glm4ForCausalLM",
        "glm4moe": "Glm4MoeForCausalLM Glm4vMoeForConditionalGeneration",
        "gemma": "GemmaForCausalLM",
        "gemma2": "Gemma2ForCausalLM",
        "gemma3": "Gemma3ForCausalLM Gemma3ForConditionalGeneration",
        "gemma3n": "Gemma3nForCausalLM Gemma3nForConditionalGeneration",
        "nemotron": "NemotronForCausalLM",
        "stablelm": "StableLmForCausalLM StableLMEpochForCausalLM",
        "exaone": "ExaoneForCausalLM",
        "exaone4": "Exaone4ForCausalLM",
        "gpt2": "GPT2LMHeadModel",
        "bloom": "BloomForCausalLM BloomModel",
        "gptneox": "GPTNeoXForCausalLM",
        "falcon": "FalconForCausalLM RWForCausalLM",
        "mpt": "MPTForCausalLM MptForCausalLM",
    }.items()
    for name in names.split()
}
"""The architecture of each class that a config.json names."""

MODEL_TYPES: Final[dict[str, str]] = {
    name: architecture
    for architecture, names in {
        "llama": "llama mistral mixtral internlm3 voxtral",
        "llama4": "llama4 llama4_text",
        "mistral3": "mistral3 ministral3",
        "smollm3": "smollm3",
        "arcee": "arcee",
        "granite": "granite",
        "granitemoe": "granitemoe granitemoeshared",
        "granitehybrid": "granitemoehybrid",
        "deci": "nemotron-nas deci",
        "minicpm": "minicpm",
        "minicpm3": "minicpm3",
        "olmo": "olmo",
        "olmo2": "olmo2 olmo3",
        "olmoe": "olmoe",
        "seed_oss": "seed_oss",
        "orion": "orion",
        "xverse": "xverse",
        "deepseek": "deepseek",
        "deepseek2": "deepseek_v2 deepseek_v3",
        "baichuan": "baichuan",
        "internlm2": "internlm2",
        "qwen": "qwen",
        "qwen2": "qwen2",
        "qwen2vl": "qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text",
        "qwen2moe": "qwen2_moe",
        "qwen3": "qwen3",
        "qwen3moe": "qwen3_moe",
        "qwen3vl": "qwen3_vl qwen3_vl_text",
        "qwen3vlmoe": "qwen3_vl_moe qwen3_vl_moe_text",
        "qwen3next": "qwen3_next",
        "qwen35": "qwen3_5 qwen3_5_text",
        "qwen35moe": "qwen3_5_moe qwen3_5_moe_text",
        "phi2": "phi",
        "phi3": "phi3",
        "phimoe": "phimoe",
        "starcoder": "gpt_bigcode",
        "starcoder2": "starcoder2",
        "command-r": "cohere",
        "cohere2": "cohere2",
        "ernie4_5": "ernie4_5",
        "ernie4_5-moe": "ernie4_5_moe",
        "gpt-oss": "gpt_oss",
        "chatglm": "glm chatglm",
        "glm4": "glm4",
        "glm4moe": "glm4_moe",
        "gemma": "gemma",
        "gemma2": "gemma2",
        "gemma3": "gemma3 gemma3_text",
        "gemma3n": "gemma3n gemma3n_text",
        "nemotron": "nemotron",
        "stablelm": "stablelm stablelm_epoch",
        "exaone": "exaone",
        "exaone4": "exaone4",
        "gpt2": "gpt2",
        "bloom": "bloom",
        "gptneox": "gpt_neox",
        "falcon": "falcon RefinedWeb RefinedWebModel",
        "mpt": "mpt",
    }.items()
    for name in names.split()
}
"""The same of each model type, where a config.json names no class that is known."""
