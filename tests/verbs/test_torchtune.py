"""torchtune: names, and the rows of queries and keys by the formula of its own weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from deltas import dense_deltas, relative_error
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import LoratoolError, UnsupportedError

HEADS: Final = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
SHAPES: Final = {
    "self_attn.q_proj": (16, 12),
    "self_attn.k_proj": (8, 12),
    "self_attn.v_proj": (8, 12),
    "self_attn.o_proj": (12, 16),
    "mlp.gate_proj": (20, 12),
    "mlp.down_proj": (12, 20),
    "mlp.up_proj": (20, 12),
}
NAMES: Final = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
PERMUTED: Final = ("LlamaForCausalLM", "MistralForCausalLM", "GemmaForCausalLM")
IN_ORDER: Final = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")


def config(architecture: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
    }


def in_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows of transformers as torchtune has them: its ``_permute`` of weights."""
    size = rows.shape[0] // heads
    seen = rows.reshape(heads, 2, size // 2, *rows.shape[1:])
    return seen.transpose(1, 2).reshape(rows.shape).contiguous()


def write(folder: Path, architecture: str, *, is_told: bool = True) -> dict[str, torch.Tensor]:
    """Write an adapter as torchtune does; return the deltas, with a scale of 2."""
    folder.mkdir()
    tensors, truth = {}, {}
    for layer in range(2):
        for leaf, (out, into) in SHAPES.items():
            down, up = torch.randn(4, into), torch.randn(out, 4)
            truth[f"model.layers.{layer}.{leaf}"] = 2 * up.double() @ down.double()
            stored = up
            if leaf in HEADS and architecture in PERMUTED:
                stored = in_pairs(up, HEADS[leaf])
            name = f"layers.{layer}.{NAMES[leaf]}"
            tensors |= {f"{name}.lora_a.weight": down, f"{name}.lora_b.weight": stored}
    torch.save(tensors, folder / "adapter_model.pt")
    said = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    if is_told:
        (folder / "config.json").write_text(json.dumps(config(architecture)))
    return truth


def base(folder: Path, architecture: str) -> tuple[Path, dict[str, torch.Tensor]]:
    weights = {
        f"model.layers.{layer}.{leaf}.weight": torch.randn(*shape)
        for layer in range(2)
        for leaf, shape in SHAPES.items()
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config(architecture)))
    return folder, weights


@pytest.mark.parametrize("architecture", [*PERMUTED, *IN_ORDER])
@pytest.mark.parametrize("is_told", [True, False])
def test_to_peft_and_merged(architecture: str, is_told: bool, tmp_path: Path) -> None:
    truth = write(tmp_path / "tune", architecture, is_told=is_told)
    model, weights = base(tmp_path / "base", architecture)
    given = None if is_told else model
    loratool.convert(tmp_path / "tune", "peft", tmp_path / "peft", base=given)
    assert relative_error(dense_deltas(tmp_path / "peft"), truth) < 1e-6
    loratool.merge(model, [tmp_path / "tune"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for module, delta in truth.items():
        wanted = weights[f"{module}.weight"].double() + delta
        torch.testing.assert_close(
            merged[f"{module}.weight"].double(), wanted, rtol=1e-6, atol=1e-5
        )


@pytest.mark.parametrize("architecture", [*PERMUTED, *IN_ORDER])
def test_written_again_it_is_what_it_was(architecture: str, tmp_path: Path) -> None:
    write(tmp_path / "tune", architecture)
    model, _ = base(tmp_path / "base", architecture)
    loratool.convert(tmp_path / "tune", "peft", tmp_path / "peft")
    loratool.convert(tmp_path / "peft", "torchtune", tmp_path / "again", base=model)
    one, other = (
        torch.load(tmp_path / name / "adapter_model.pt", weights_only=True)
        for name in ("tune", "again")
    )
    assert one.keys() == other.keys()
    for key, value in one.items():  # the scale of 2, which only a recipe says, is in B
        assert torch.equal(other[key], 2 * value if key.endswith("lora_b.weight") else value)


def test_without_the_heads_queries_and_keys_are_not_known(tmp_path: Path) -> None:
    write(tmp_path / "tune", "LlamaForCausalLM", is_told=False)
    adapter = loratool.open_adapter(tmp_path / "tune")
    assert sorted(adapter.unresolved) == [
        f"layers.{layer}.attn.{side}_proj" for layer in range(2) for side in "kq"
    ]
    with pytest.raises(LoratoolError, match="attention heads"):
        loratool.convert(tmp_path / "tune", "peft", tmp_path / "peft")
    truth = write(tmp_path / "other", "LlamaForCausalLM")
    loratool.convert(tmp_path / "other", "peft", tmp_path / "peft")
    with pytest.raises(UnsupportedError, match="order of torchtune's own") as caught:
        loratool.convert(tmp_path / "peft", "torchtune", tmp_path / "x")
    assert "--base" in str(caught.value.hint)
    assert truth


def test_a_truncation_keeps_its_order(tmp_path: Path) -> None:
    truth = write(tmp_path / "tune", "LlamaForCausalLM")
    model, _ = base(tmp_path / "base", "LlamaForCausalLM")
    loratool.truncate(tmp_path / "tune", tmp_path / "cut", rank=4)
    loratool.convert(tmp_path / "cut", "peft", tmp_path / "peft", base=model)
    assert relative_error(dense_deltas(tmp_path / "peft"), truth) < 1e-6


def test_phi_3_is_in_parts_there(tmp_path: Path) -> None:
    said = {"architectures": ["Phi3ForCausalLM"], "num_attention_heads": 4}
    said |= {"num_key_value_heads": 2}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(said))
    a, b = torch.randn(4, 12), torch.randn(32, 4)
    block = "model.layers.0"
    tensors = {
        f"{block}.self_attn.qkv_proj.lora_A.weight": a,
        f"{block}.self_attn.qkv_proj.lora_B.weight": b,
        f"{block}.mlp.gate_up_proj.lora_A.weight": a.clone(),
        f"{block}.mlp.gate_up_proj.lora_B.weight": b.clone(),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.convert(
        tmp_path / "a.safetensors", "torchtune", tmp_path / "a.pt", base=tmp_path / "base"
    )
    made = torch.load(tmp_path / "a.pt", weights_only=True)
    rows = {"attn.q_proj": (0, 16), "attn.k_proj": (16, 24), "attn.v_proj": (24, 32)}
    rows |= {"mlp.w1": (0, 16), "mlp.w3": (16, 32)}
    for name, (first, last) in rows.items():
        assert torch.equal(made[f"layers.0.{name}.lora_b.weight"], b[first:last])
        assert torch.equal(made[f"layers.0.{name}.lora_a.weight"], a)
    assert len(made) == 10


def test_magnitudes_lie_as_their_rows_do(tmp_path: Path) -> None:
    write(tmp_path / "tune", "LlamaForCausalLM")
    path = tmp_path / "tune" / "adapter_model.pt"
    tensors = torch.load(path, weights_only=True)
    wanted = {}
    for layer in range(2):
        for leaf, (out, _) in SHAPES.items():
            rows = wanted[f"model.layers.{layer}.{leaf}"] = torch.rand(out) + 1
            stored = in_pairs(rows, HEADS[leaf]) if leaf in HEADS else rows
            tensors[f"layers.{layer}.{NAMES[leaf]}.magnitude"] = stored
    torch.save(tensors, path)
    said = json.loads((tmp_path / "tune" / "adapter_config.json").read_text())
    said["use_dora"] = True
    (tmp_path / "tune" / "adapter_config.json").write_text(json.dumps(said))
    loratool.convert(tmp_path / "tune", "peft", tmp_path / "peft")
    made = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for module, rows in wanted.items():
        assert torch.equal(made[f"base_model.model.{module}.lora_magnitude_vector"], rows)
    model, weights = base(tmp_path / "base", "LlamaForCausalLM")
    loratool.convert(tmp_path / "peft", "torchtune", tmp_path / "again", base=model)
    again = torch.load(tmp_path / "again" / "adapter_model.pt", weights_only=True)
    assert all(torch.equal(again[key], tensors[key]) for key in tensors if "magnitude" in key)
    for name in ("tune", "peft"):
        loratool.merge(model, [tmp_path / name], tmp_path / f"{name}-merged")
    one, other = (
        load_file(tmp_path / f"{name}-merged" / "model.safetensors") for name in ("tune", "peft")
    )
    assert all(torch.equal(one[key], other[key]) for key in weights)
