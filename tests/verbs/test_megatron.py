"""Megatron's adapters: fused layers by groups, in the names of NeMo 1, NeMo 2 and Bridge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest
import torch
from deltas import dense_deltas, relative_error
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import LoratoolError

HEADS, GROUPS, SIZE, WIDTH, RANK = 6, 2, 4, 12, 3
ALPHA: Final = 6.0
OWN: Final = {
    "self_attention.linear_qkv": "self_attention.linear_qkv.adapter.{}",
    "self_attention.linear_proj": "self_attention.linear_proj.adapter.{}",
    "mlp.linear_fc1": "mlp.linear_fc1.adapter.{}",
    "mlp.linear_fc2": "mlp.linear_fc2.adapter.{}",
}
FIRST: Final = {
    "self_attention.linear_qkv": "self_attention.adapter_layer.lora_kqv_adapter.{}",
    "self_attention.linear_proj": "self_attention.adapter_layer.lora_dense_attention_adapter.{}",
    "mlp.linear_fc1": "mlp.adapter_layer.lora_hto4h_adapter.{}",
    "mlp.linear_fc2": "mlp.adapter_layer.lora_4htoh_adapter.{}",
}
NAMES: Final = {
    "Bridge": ("decoder.layers.0.", OWN),
    "wrapped": ("module.decoder.layers.0.", OWN),
    "NeMo 1": ("model.decoder.layers.0.", FIRST),
}
ROWS: Final = {"q": HEADS * SIZE, "k": GROUPS * SIZE, "v": GROUPS * SIZE}


def by_groups(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return rows of q, k and v as Megatron fuses them: group by group."""
    size, each = SIZE, HEADS // GROUPS
    rows = []
    for group in range(GROUPS):
        rows.append(parts["q"][group * each * size : (group + 1) * each * size])
        rows += [parts[side][group * size : (group + 1) * size] for side in "kv"]
    return torch.cat(rows)


def write(path: Path, names: str) -> dict[str, torch.Tensor]:
    """Write an adapter; return the deltas."""
    prefix, table = NAMES[names]
    tensors, truth = {}, {}
    hub = "model.layers.0"

    def put(own: str, a: torch.Tensor, b: torch.Tensor) -> None:
        tensors[prefix + table[own].format("linear_in.weight")] = a
        tensors[prefix + table[own].format("linear_out.weight")] = b

    scale = ALPHA / RANK
    a, ups = torch.randn(RANK, WIDTH), {s: torch.randn(n, RANK) for s, n in ROWS.items()}
    put("self_attention.linear_qkv", a, by_groups(ups))
    for side, up in ups.items():
        truth[f"{hub}.self_attn.{side}_proj"] = scale * up.double() @ a.double()
    a, gate, up = torch.randn(RANK, WIDTH), torch.randn(20, RANK), torch.randn(20, RANK)
    put("mlp.linear_fc1", a, torch.cat([gate, up]))
    truth[f"{hub}.mlp.gate_proj"] = scale * gate.double() @ a.double()
    truth[f"{hub}.mlp.up_proj"] = scale * up.double() @ a.double()
    for own, leaf, into in (
        ("self_attention.linear_proj", "self_attn.o_proj", ROWS["q"]),
        ("mlp.linear_fc2", "mlp.down_proj", 20),
    ):
        a, b = torch.randn(RANK, into), torch.randn(WIDTH, RANK)
        put(own, a, b)
        truth[f"{hub}.{leaf}"] = scale * b.double() @ a.double()
    save_file(tensors, path)
    return truth


def base(folder: Path, truth: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": HEADS}
    config |= {"num_key_value_heads": GROUPS, "head_dim": SIZE}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"{module}.weight": torch.zeros(d.shape) for module, d in truth.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("names", NAMES)
def test_to_peft_and_merged(names: str, tmp_path: Path) -> None:
    truth = write(tmp_path / "a.safetensors", names)
    model = base(tmp_path / "base", truth)
    options = {"alpha": ALPHA}
    loratool.convert(tmp_path / "a.safetensors", "peft", tmp_path / "p", base=model, **options)
    assert relative_error(dense_deltas(tmp_path / "p"), truth) < 1e-6
    loratool.merge(model, [tmp_path / "a.safetensors"], tmp_path / "m", **options)
    merged = load_file(tmp_path / "m" / "model.safetensors")
    for module, delta in truth.items():
        found = merged[f"{module}.weight"].double()
        torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-5)


def test_nemo_1_says_the_heads_itself(tmp_path: Path) -> None:
    truth = write(tmp_path / "a.safetensors", "NeMo 1")
    said = f"num_attention_heads: {HEADS}\nnum_query_groups: {GROUPS}\nactivation: fast-swiglu\n"
    (tmp_path / "model_config.yaml").write_text(f"{said}peft:\n  peft_scheme: lora\n")
    loratool.convert(tmp_path / "a.safetensors", "peft", tmp_path / "p", alpha=ALPHA)
    assert relative_error(dense_deltas(tmp_path / "p"), truth) < 1e-6


def test_without_heads_only_what_is_not_fused_is_known(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", "Bridge")
    adapter = loratool.open_adapter(tmp_path / "a.safetensors")
    assert len(adapter.unresolved) == 2
    with pytest.raises(LoratoolError, match="attention heads"):
        loratool.convert(tmp_path / "a.safetensors", "peft", tmp_path / "p")


@pytest.mark.parametrize("is_first", [True, False])
def test_canonical_adapters_are_the_projections_themselves(is_first: bool, tmp_path: Path) -> None:
    tensors, truth = {}, {}
    block = "decoder.layers.1"
    names = {
        "self_attn.q_proj": "self_attention.linear_qkv.adapter.adapter_q",
        "self_attn.v_proj": "self_attention.linear_qkv.adapter.adapter_v",
        "mlp.gate_proj": "mlp.linear_fc1.adapter.adapter_gate",
        "mlp.up_proj": "mlp.linear_fc1.adapter.adapter_up",
    }
    if is_first:
        names = {
            "self_attn.q_proj": "self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter",
            "mlp.gate_proj": "mlp.adapter_layer.lora_unfused_hto4h_adapter.gate_adapter",
        }
    for leaf, own in names.items():
        a, b = torch.randn(RANK, WIDTH), torch.randn(8, RANK)
        tensors |= {f"{block}.{own}.linear_in.weight": a, f"{block}.{own}.linear_out.weight": b}
        truth[f"model.layers.1.{leaf}"] = ALPHA / RANK * b.double() @ a.double()
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.convert(tmp_path / "a.safetensors", "peft", tmp_path / "p", alpha=ALPHA)
    assert relative_error(dense_deltas(tmp_path / "p"), truth) < 1e-6


def test_fused_adapters_are_written_fused_and_others_as_projections(tmp_path: Path) -> None:
    truth = write(tmp_path / "a.safetensors", "Bridge")
    model = base(tmp_path / "base", truth)
    options = {"base": model, "alpha": ALPHA}
    report = loratool.convert(tmp_path / "a.safetensors", "megatron", tmp_path / "again", **options)
    assert any("with LoRA, alpha = dim" in note for note in report.plan.notes)
    again = loratool.open_adapter(tmp_path / "again").tensors
    assert set(again) == set(load_file(tmp_path / "a.safetensors"))
    loratool.convert(tmp_path / "again", "peft", tmp_path / "p", base=model)
    assert relative_error(dense_deltas(tmp_path / "p"), truth) < 1e-6
    # PEFT has an A of each: three that are equal are no longer one.
    report = loratool.convert(tmp_path / "p", "megatron", tmp_path / "apart", base=model)
    assert any("with CanonicalLoRA" in note for note in report.plan.notes)
    assert any(
        "adapter.adapter_q" in key for key in loratool.open_adapter(tmp_path / "apart").tensors
    )
    loratool.convert(tmp_path / "apart", "peft", tmp_path / "q")
    assert relative_error(dense_deltas(tmp_path / "q"), truth) < 1e-6


def test_what_has_no_name_is_refused(tmp_path: Path) -> None:
    name = "model.vision.blocks.0.fc"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, 4),
        f"{name}.lora_B.weight": torch.randn(4, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LoratoolError, match="no module of a model of Llama's kind") as caught:
        loratool.convert(tmp_path / "a.safetensors", "megatron", tmp_path / "m")
    assert "--drop" in str(caught.value.hint)
