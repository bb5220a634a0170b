"""Tiny adapters of every architecture of llama.cpp that is known, for its own converter and ours.

Each adapts what a model of the architecture has; numbers are small multiples of 1/8, by name.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file

from loratool.names.gguf.tables import ARCHITECTURES, CLASSES

HEADS, SIZE, HIDDEN, WIDE, TOKENS, EXPERTS, RANK = 4, 8, 32, 48, 64, 2, 4
LAYERS: Final = 2
MHA: Final = (
    *("baichuan", "bloom", "gptneox", "gpt2", "xverse", "olmo"),
    *("qwen", "mpt", "deepseek", "starcoder", "phi2"),
)
EMBEDDINGS: Final = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")
QUERIES = HEADS * SIZE
CONFIG: Final[dict[str, Any]] = {
    "num_attention_heads": HEADS,
    "hidden_size": HIDDEN,
    "head_dim": SIZE,
    "intermediate_size": WIDE,
    "intermediate_size_mlp": WIDE,
    "vocab_size": TOKENS,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_embd": HIDDEN,
    "n_inner": WIDE,
    "rms_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_rms_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": WIDE,
    "shared_intermediate_size": WIDE,
    "shared_expert_intermediate_size": WIDE,
    "n_shared_experts": 1,
    "moe_num_experts": EXPERTS,
    "norm_topk_prob": False,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "routed_scaling_factor": 1.0,
    "rotary_pct": 1.0,
    "partial_rotary_factor": 1.0,
    "use_parallel_residual": True,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "sliding_window": 16,
    "parallel_attn": True,
    "new_decoder_architecture": True,
    "multi_query": False,
    "scale_emb": 1.0,
    "scale_depth": 1.0,
    "dim_model_base": 32,
    "logit_scale": 1.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "model_max_length": 64,
    "attn_layer_indices": [0],
    "mtp_num_hidden_layers": 1,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_conv": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""What the converter asks of one architecture or another."""


def key_heads(architecture: str) -> int:
    return HEADS if architecture in MHA else 2


def config(architecture: str) -> dict[str, Any]:
    name = next(name for name, found in CLASSES.items() if found == architecture)
    heads = key_heads(architecture)
    keys = {"num_key_value_heads": heads, "n_head_kv": heads, "num_kv_heads": heads}
    return {"architectures": [name], **CONFIG, **keys}


def shape(architecture: str, module: str) -> tuple[int, int]:
    """Return ``(out, in)`` of a module."""
    keys = key_heads(architecture) * SIZE
    leaf = module.rpartition(".")[2]
    has_mla = architecture in ("deepseek2", "minicpm3")
    if leaf == "c_proj":
        return (HIDDEN, QUERIES) if "attn" in module else (HIDDEN, WIDE)
    if leaf == "o_proj" and has_mla:
        return (HIDDEN, 8 * HEADS)
    if leaf == "w2" and architecture == "qwen":
        return (WIDE, HIDDEN)
    fused = ("W_pack", "wqkv", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
    known = {
        "q_proj": (QUERIES, HIDDEN),
        **dict.fromkeys(("k_proj", "v_proj"), (keys, HIDDEN)),
        **dict.fromkeys(("o_proj", "out_proj", "dense", "wo"), (HIDDEN, QUERIES)),
        **dict.fromkeys(fused, (QUERIES + 2 * keys, HIDDEN)),
        **dict.fromkeys(("gate_up_proj", "up_gate_proj", "input_linear"), (2 * WIDE, HIDDEN)),
        **dict.fromkeys(("down_proj", "w2", "output_linear", "fc2"), (HIDDEN, WIDE)),
        "dense_4h_to_h": (HIDDEN, WIDE),
        **dict.fromkeys(("lm_head", "output", "embed_out", "output_layer"), (TOKENS, HIDDEN)),
        **dict.fromkeys(("gate", "router", "layer"), (EXPERTS, HIDDEN)),
        "shared_expert_gate": (1, HIDDEN),
        "q_a_proj": (8, HIDDEN),
        "q_b_proj": (12 * HEADS, 8),
        "kv_a_proj_with_mqa": (12, HIDDEN),
        "kv_b_proj": (16 * HEADS, 8),
        "in_proj": (2 * HIDDEN, HIDDEN),
    }
    return known.get(leaf, (WIDE, HIDDEN))


def modules(architecture: str) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Return the linear modules of a tiny model with their shapes, and its embeddings."""
    found: dict[str, tuple[int, int]] = {}
    tables: list[str] = []
    owners: dict[str, str] = {}
    for module, tensor, _ in ARCHITECTURES[architecture]:
        leaf = module.rpartition(".")[2]
        is_vector = "norm" in leaf or leaf.startswith("ln_") or leaf == "wpe"
        is_stack = "experts." in module and "#" not in module
        is_stack |= "block_sparse_moe.input" in module or "block_sparse_moe.output" in module
        is_stack |= "mamba" in module
        if is_vector or is_stack or owners.setdefault(tensor, module) != module:
            continue
        if architecture == "deepseek2" and leaf == "kv_b_proj":
            continue
        if leaf in EMBEDDINGS:
            tables.append(module)
            continue
        has_one = architecture == "granitehybrid" and "self_attn" in module
        for layer in range(LAYERS if "*" in module and not has_one else 1):
            for expert in range(EXPERTS if "#" in module else 1):
                path = module.replace("*", str(layer)).replace("#", str(expert))
                found[path] = shape(architecture, module)
    return found, tables


def numbers(name: str, *sides: int) -> np.ndarray[Any, Any]:
    made = np.random.default_rng(zlib.crc32(name.encode())).integers(-24, 25, sides)
    return (made / 8).astype(np.float32)


def factors(architecture: str, keep: str = "") -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors of an adapter as PEFT has them.

    Args:
        architecture: Of the model.
        keep: Only modules with this in their path, if any.
    """
    linear, tables = modules(architecture)
    made = {}
    for module, (out, into) in linear.items():
        made[f"base_model.model.{module}.lora_A.weight"] = (RANK, into)
        made[f"base_model.model.{module}.lora_B.weight"] = (out, RANK)
    for module in tables:
        made[f"base_model.model.{module}.lora_embedding_A"] = (RANK, TOKENS)
        made[f"base_model.model.{module}.lora_embedding_B"] = (HIDDEN, RANK)
    return {name: numbers(name, *sides) for name, sides in made.items() if keep in name}


def hashes(tensors: Mapping[str, tuple[tuple[int, ...], bytes]]) -> dict[str, str]:
    """Return short hashes of shapes and data; those of all layers but the first as one."""
    found: dict[str, Any] = {}
    for name in sorted(tensors):
        sides, data = tensors[name]
        key = "others" if name.startswith("blk.") and not name.startswith("blk.0.") else name
        made = found.setdefault(key, hashlib.sha256())
        made.update(f"{name} {list(sides)} ".encode() + data)
    return {name: made.hexdigest()[:8] for name, made in found.items()}


def write_base(folder: Path, architecture: str) -> Path:
    """Write a model of zeros."""
    linear, tables = modules(architecture)
    is_turned = architecture == "gpt2"
    folder.mkdir(parents=True)
    weights = {f"{table}.weight": np.ones((TOKENS, HIDDEN), np.float32) for table in tables}
    for module, (out, into) in linear.items():
        sides = (into, out) if is_turned and ".h." in module else (out, into)
        weights[f"{module}.weight"] = np.zeros(sides, np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(architecture)))
    return folder


def write_adapter(folder: Path, architecture: str, keep: str = "") -> Path:
    """Write an adapter of it as PEFT has it."""
    folder.mkdir(parents=True)
    tensors = factors(architecture, keep)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    said["base_model_name_or_path"] = f"someone/tiny-{architecture}"
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder
