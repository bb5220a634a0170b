"""Modules that an adapter saves whole, where the base has cut or turned them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.errors import LoratoolError

Make = Callable[..., Path]
LAYER = "model.layers.0"
PHI3 = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "hidden_size": 8,
}
QWEN = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 8}


def result(base: Path, adapter: Path, **options: object) -> dict[str, torch.Tensor]:
    out = base.parent / "out"
    loratool.merge(base, [adapter], out, force=True, **options)
    assert loratool.verify(out, base=base, adapters=[adapter], **options) == ()
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_a_part_of_a_fused_projection(weight: float, make_base: Make, make_adapter: Make) -> None:
    whole, bias = f"{LAYER}.self_attn.qkv_proj.weight", f"{LAYER}.self_attn.qkv_proj.bias"
    before = {whole: torch.randn(12, 8), bias: torch.randn(12)}
    saved = {"weight": torch.randn(2, 8), "bias": torch.randn(2)}
    tensors = {f"{LAYER}.self_attn.k_proj.{leaf}": value for leaf, value in saved.items()}
    tensors |= lora(f"{LAYER}.self_attn.q_proj", 8, 8)
    adapter = make_adapter(tensors, target_modules=["q_proj"], modules_to_save=["k_proj"])
    after = result(make_base(before, config=PHI3), adapter, weights=[weight])
    assert set(after) == set(before)
    for name, leaf in ((whole, "weight"), (bias, "bias")):
        rows = before[name][8:10]
        expected = rows + weight * (saved[leaf] - rows)
        assert torch.allclose(after[name][8:10], expected, atol=1e-6)
        assert torch.equal(after[name][10:], before[name][10:])
    assert torch.equal(after[bias][:8], before[bias][:8])


def test_a_fused_projection_of_a_base_that_has_it_apart(
    make_base: Make, make_adapter: Make
) -> None:
    path = f"{LAYER}.mlp"
    before = {f"{path}.{leaf}.weight": torch.randn(6, 8) for leaf in ("gate_proj", "up_proj")}
    before |= {f"{LAYER}.self_attn.q_proj.weight": torch.randn(8, 8)}
    saved = torch.randn(12, 8)
    tensors = {f"{path}.gate_up_proj.weight": saved} | lora(f"{LAYER}.self_attn.q_proj", 8, 8)
    adapter = make_adapter(tensors, target_modules=["q_proj"], modules_to_save=["gate_up_proj"])
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    after = result(make_base(before, config=config), adapter)
    assert set(after) == set(before)
    assert torch.equal(after[f"{path}.gate_proj.weight"], saved[:6])
    assert torch.equal(after[f"{path}.up_proj.weight"], saved[6:])


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_experts_in_one_of_a_base_that_has_them_apart(
    weight: float, make_base: Make, make_adapter: Make
) -> None:
    path, count = f"{LAYER}.mlp", 3
    sizes = {"gate_proj": (5, 8), "up_proj": (5, 8), "down_proj": (8, 5)}
    before = {
        f"{path}.experts.{expert}.{leaf}.weight": torch.randn(*shape)
        for expert in range(count)
        for leaf, shape in sizes.items()
    }
    before |= {f"{LAYER}.self_attn.q_proj.weight": torch.randn(8, 8)}
    saved = {"gate_up_proj": torch.randn(count, 10, 8), "down_proj": torch.randn(count, 8, 5)}
    tensors = {f"{path}.experts.{leaf}": value for leaf, value in saved.items()}
    tensors |= lora(f"{LAYER}.self_attn.q_proj", 8, 8)
    adapter = make_adapter(tensors, target_modules=["q_proj"], modules_to_save=["mlp"])
    after = result(make_base(before, config=QWEN), adapter, weights=[weight])
    assert set(after) == set(before)
    for expert in range(count):
        parts = {
            "gate_proj": saved["gate_up_proj"][expert, :5],
            "up_proj": saved["gate_up_proj"][expert, 5:],
            "down_proj": saved["down_proj"][expert],
        }
        for leaf, value in parts.items():
            name = f"{path}.experts.{expert}.{leaf}.weight"
            expected = before[name] + weight * (value - before[name])
            assert torch.allclose(after[name], expected, atol=1e-6), name


def test_another_shape_is_refused(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    before = {f"{LAYER}.self_attn.qkv_proj.weight": torch.randn(12, 8)}
    tensors = {f"{LAYER}.self_attn.k_proj.weight": torch.randn(3, 8)}
    tensors |= lora(f"{LAYER}.self_attn.q_proj", 8, 8)
    adapter = make_adapter(tensors, target_modules=["q_proj"], modules_to_save=["k_proj"])
    with pytest.raises(LoratoolError, match=r"shape \[3, 8\], the base's weight \[2, 8\]"):
        loratool.merge(make_base(before, config=PHI3), [adapter], tmp_path / "out")


@pytest.mark.parametrize("rows", [6, 7])
@pytest.mark.parametrize("leaf", ["weight", "diff", "set_weight"])
def test_a_projection_that_the_file_has_turned(leaf: str, rows: int, tmp_path: Path) -> None:
    stem = "conditioner.embedders.1.model."
    before = {
        f"{stem}text_projection": torch.randn(6, rows),
        f"{stem}transformer.resblocks.0.mlp.c_fc.weight": torch.randn(24, 6),
        "model.diffusion_model.input_blocks.4.1.proj_in.weight": torch.randn(4, 4),
        "model.diffusion_model.label_emb.0.0.weight": torch.randn(4, 4),
    }
    save_file(before, tmp_path / "base.safetensors")
    value = torch.randn(rows, 6)
    name = {
        "weight": "text_encoder_2.text_projection",
        "diff": "lora_te2_text_projection",
        "set_weight": "text_encoders.clip_g.transformer.text_projection",
    }[leaf]
    other = "unet.down_blocks.1.attentions.0.proj_in"
    tensors = {f"{name}.{leaf}": value}
    if leaf == "weight":
        tensors |= lora(other, 4, 4)
    if leaf == "set_weight":
        tensors |= lora("diffusion_model.input_blocks.4.1.proj_in", 4, 4)
    save_file(tensors, tmp_path / "lora.safetensors")
    loratool.merge(
        tmp_path / "base.safetensors", [tmp_path / "lora.safetensors"], tmp_path / "o.safetensors"
    )
    found = load_file(tmp_path / "o.safetensors")[f"{stem}text_projection"]
    expected = value.T + (before[f"{stem}text_projection"] if leaf == "diff" else 0)
    assert torch.allclose(found, expected, atol=1e-6)
