"""Merges into GGUF files, read by transformers, which puts rows and names back by its own rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from transformers.pytorch_utils import Conv1D

import loratool

gguf = pytest.importorskip("gguf")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 40,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LLAMA", COMMON | {"tie_word_embeddings": False}),
    "llama-with-biases": ("llama", "LLAMA", COMMON | {"attention_bias": True}),
    "qwen2": ("qwen2", "QWEN2", COMMON),
    "qwen3": ("qwen3", "QWEN3", COMMON | {"head_dim": 8}),
    "phi3": ("phi3", "PHI3", COMMON),
    "stablelm": ("stablelm", "STABLELM", COMMON),
    "starcoder2": ("starcoder2", "STARCODER2", COMMON),
    "nemotron": ("nemotron", "NEMOTRON", COMMON),
    "gemma2": ("gemma2", "GEMMA2", COMMON | {"head_dim": 8}),
    "gemma3": ("gemma3_text", "GEMMA3", COMMON | {"head_dim": 8}),
    "gpt2": (
        "gpt2",
        "GPT2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 64},
    ),
    "bloom": ("bloom", "BLOOM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40}),
    "qwen3moe": (
        "qwen3_moe",
        "QWEN3MOE",
        COMMON
        | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "qwen2moe": (
        "qwen2_moe",
        "QWEN2MOE",
        COMMON
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 48,
            "decoder_sparse_step": 1,
        },
    ),
}


def made(kind: str, folder: Path) -> tuple[Any, Path]:
    """Return a model of a kind and a file with random numbers for all of its tensors."""
    model_type, name, settings = MODELS[kind]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    architecture = getattr(gguf.MODEL_ARCH, name)
    names = gguf.get_tensor_name_map(architecture, 2)
    folder.mkdir()
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(settings.get("intermediate_size", 128))
    writer.add_head_count(4)
    writer.add_head_count_kv(settings.get("num_key_value_heads", 4))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(40)
    if "head_dim" in settings:
        writer.add_key_length(8)
    if "num_experts" in settings:
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
    random = np.random.default_rng(0)
    turned = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Conv1D)}
    seen = set()
    for key, value in model.state_dict().items():
        shape, parts = list(value.shape), [key]
        if key in turned:
            shape = shape[::-1]
        if key.endswith("shared_expert_gate.weight"):
            shape = shape[1:]
        if key.endswith("experts.gate_up_proj"):
            shape[1] //= 2
            parts = [key.replace("gate_up_proj", leaf) for leaf in ("gate_proj", "up_proj")]
        for part in parts:
            stem, _, leaf = part.rpartition(".")
            is_parameter = "experts." in part and not leaf.startswith(("weight", "bias"))
            found = names.get_name(part if is_parameter else stem)
            if found is None or (found == "output" and config.tie_word_embeddings):
                continue
            stored = f"{found}.{'weight' if is_parameter else leaf}"
            if stored not in seen:
                seen.add(stored)
                writer.add_tensor(stored, random.standard_normal(shape).astype(np.float32) * 0.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path


def loaded(path: Path, config: Any) -> dict[str, np.ndarray]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(name.endswith("proj.weight") for name in info["missing_keys"])
    return {name: value.numpy() for name, value in model.state_dict().items()}


def adapter(model: Any, folder: Path) -> dict[str, np.ndarray]:
    """Write an adapter of all linear layers, and of experts; return deltas as weights have them."""
    random = np.random.default_rng(1)
    tensors, deltas = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D) or name == "lm_head":
            continue
        if name.endswith("shared_expert_gate"):  # a vector in llama.cpp
            continue
        out, into = module.weight.shape
        if isinstance(module, Conv1D):
            out, into = into, out
        down = random.standard_normal((2, into)).astype("f4")
        up = random.standard_normal((out, 2)).astype("f4") * 0.1
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        delta = 2 * up.astype("f8") @ down
        deltas[f"{name}.weight"] = delta.T if isinstance(module, Conv1D) else delta
    save(folder, tensors)
    return deltas


def save(folder: Path, tensors: dict[str, np.ndarray], **more: Any) -> None:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "fan_in_fan_out": False, **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", MODELS)
def test_a_merge_changes_what_transformers_reads_as_the_adapter_says(
    kind: str, tmp_path: Path
) -> None:
    model, path = made(kind, tmp_path / "base")
    deltas = adapter(model, tmp_path / "adapter")
    assert len(deltas) >= 8
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "model.gguf"
    loratool.merge(path, [tmp_path / "adapter"], out)
    before, after = loaded(path, model.config), loaded(out, model.config)
    assert before.keys() == after.keys()
    for name, old in before.items():
        if name not in deltas:
            assert np.array_equal(old, after[name]), name
            continue
        found = after[name].astype("f8") - old
        np.testing.assert_allclose(found, deltas[name], atol=1e-6, err_msg=name)
    assert loratool.verify(out, base=path, adapters=[tmp_path / "adapter"]) == ()


@pytest.mark.parametrize("kind", ["qwen3moe", "qwen2moe"])
@pytest.mark.parametrize("is_fused", [True, False])
def test_experts_are_merged_into_their_stacks(kind: str, is_fused: bool, tmp_path: Path) -> None:
    model, path = made(kind, tmp_path / "base")
    random = np.random.default_rng(2)
    tensors: dict[str, np.ndarray] = {}
    wanted: dict[str, np.ndarray] = {}
    parameters = []
    for layer in range(2):
        stack = f"model.layers.{layer}.mlp.experts"
        if is_fused:
            for leaf, out, into in (("gate_up_proj", 96, 32), ("down_proj", 32, 48)):
                # PEFT's factors of a stack: each expert's one after the other.
                down = random.standard_normal((8, into)).astype("f4")
                up = random.standard_normal((out, 8)).astype("f4") * 0.1
                key = f"base_model.model.{stack}" + (
                    ".base_layer" if leaf == "gate_up_proj" else ""
                )
                tensors[f"{key}.lora_A.weight"] = down
                tensors[f"{key}.lora_B.weight"] = up
                # lora_B has its experts innermost.
                ups = up.reshape(out, 2, 4)
                wanted[f"{stack}.{leaf}"] = np.stack(
                    [2 * ups[:, :, e].astype("f8") @ down[2 * e : 2 * e + 2] for e in range(4)]
                )
            parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
            continue
        parts: dict[str, list[np.ndarray]] = {}
        for leaf, out, into in (("gate_proj", 48, 32), ("up_proj", 48, 32), ("down_proj", 32, 48)):
            for expert in range(4):
                down = random.standard_normal((2, into)).astype("f4")
                up = random.standard_normal((out, 2)).astype("f4") * 0.1
                key = f"base_model.model.{stack}.{expert}.{leaf}"
                tensors[f"{key}.lora_A.weight"] = down
                tensors[f"{key}.lora_B.weight"] = up
                parts.setdefault(leaf, []).append(2 * up.astype("f8") @ down)
        gate_up = [
            np.concatenate(pair) for pair in zip(parts["gate_proj"], parts["up_proj"], strict=True)
        ]
        wanted[f"{stack}.gate_up_proj"] = np.stack(gate_up)
        wanted[f"{stack}.down_proj"] = np.stack(parts["down_proj"])
    more = (
        {"target_parameters": parameters, "target_modules": [], "peft_version": "0.21.2"}
        if is_fused
        else {}
    )
    save(tmp_path / "adapter", tensors, **more)
    (tmp_path / "out").mkdir()
    out_path = tmp_path / "out" / "model.gguf"
    loratool.merge(path, [tmp_path / "adapter"], out_path)
    before, after = loaded(path, model.config), loaded(out_path, model.config)
    for name, old in before.items():
        if name in wanted:
            np.testing.assert_allclose(after[name].astype("f8") - old, wanted[name], atol=1e-5)
        else:
            assert np.array_equal(old, after[name]), name
