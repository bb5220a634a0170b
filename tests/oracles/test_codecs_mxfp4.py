"""GPT-OSS' experts in MXFP4: read as transformers reads them, merged, and loaded by it again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from coded_files import matrix_of, weight_in
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import loratool
from loratool.codecs import mxfp4
from loratool.plan import recoding

EXPERTS = "model.layers.0.mlp.experts"
NAMES = ("gate_up_proj", "down_proj")
SIZES = {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 32, "head_dim": 8}
CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}


def packed(experts: int, out: int, into: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = torch.randint(0, 256, (experts, out, into // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(117, 123, (experts, out, into // 32), dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(3, 10, 64), (2, 33, 96)])
def test_a_stack_is_what_transformers_makes_of_it(
    shape: tuple[int, int, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    blocks, scales = packed(*shape)
    tensors = {f"{EXPERTS}.down_proj_blocks": blocks, f"{EXPERTS}.down_proj_scales": scales}
    weight = weight_in(tmp_path, tensors, CONFIG, f"{EXPERTS}.down_proj")
    expected = convert_moe_packed_tensors(blocks, scales).double().numpy()
    assert weight.spec.shape == expected.shape
    assert np.array_equal(matrix_of(weight), expected)


def model_folder(path: Path) -> Path:
    """Save a tiny GPT-OSS whose experts are packed."""
    torch.manual_seed(0)
    config = tf.GptOssConfig(
        **SIZES,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    model = tf.GptOssForCausalLM(config).bfloat16()
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    for name, out, into in ((NAMES[0], 2 * inner, hidden), (NAMES[1], hidden, inner)):
        assert tensors.pop(f"{EXPERTS}.{name}").shape == (3, into, out)
        pair = packed(3, out, into)
        tensors |= dict(
            zip((f"{EXPERTS}.{name}_blocks", f"{EXPERTS}.{name}_scales"), pair, strict=True)
        )
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(said | {"quantization_config": CONFIG}))
    return path


def adapter_folder(base: Path, path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save an adapter on experts and attention, and return what PEFT merges it to."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        target_parameters=[f"mlp.experts.{name}" for name in NAMES],
    )
    model = get_peft_model(loaded(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(path)
    merged = PeftModel.from_pretrained(loaded(base).float(), path).merge_and_unload()
    return path, dict(merged.state_dict())


def loaded(path: Path) -> torch.nn.Module:
    return tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_experts_is_merged_and_loads(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    adapter, expected = adapter_folder(base, tmp_path / "adapter")
    assert not [f for f in loratool.validate(adapter, base=base) if f.severity == "error"]
    report = loratool.merge(base, [adapter], tmp_path / "out")
    assert report.merged == 3
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in said
    found = loaded(tmp_path / "out").state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16
        close = torch.isclose(found[name].float(), tensor.float(), rtol=2**-7, atol=1e-6)
        assert close.all(), name
    changed = f"{EXPERTS}.gate_up_proj"
    assert (found[changed] - loaded(base).state_dict()[changed]).norm() > 0.1
    assert not loratool.verify(tmp_path / "out", base=base, adapters=[adapter])


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_merged_into_mxfp4_again(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    adapter, expected = adapter_folder(base, tmp_path / "adapter")
    loratool.merge(base, [adapter], tmp_path / "out", quantized="keep")
    before, after = (load_file(p / "model.safetensors") for p in (base, tmp_path / "out"))
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {
        k: (t.dtype, t.shape) for k, t in after.items()
    }
    assert not [k for k in before if "lm_head" in k and not torch.equal(before[k], after[k])]
    found = loaded(tmp_path / "out").state_dict()
    for name in NAMES:
        wanted, kept = expected[f"{EXPERTS}.{name}"].float(), found[f"{EXPERTS}.{name}"].float()
        assert (kept - wanted).norm() < 0.12 * wanted.norm()
    assert not loratool.verify(tmp_path / "out", base=base, adapters=[adapter])


@pytest.mark.filterwarnings("ignore")
def test_experts_come_about_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = model_folder(tmp_path / "base")
    adapter, _ = adapter_folder(base, tmp_path / "adapter")
    whole = loratool.merge(base, [adapter], tmp_path / "whole", quantized="keep")
    monkeypatch.setattr(recoding, "BLOCK_ELEMENTS", 640)
    monkeypatch.setattr(mxfp4, "STEP", 640)
    pieces = loratool.merge(base, [adapter], tmp_path / "pieces", quantized="keep")
    assert pieces.retention == pytest.approx(whole.retention, rel=1e-4)
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "pieces")
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_extracted_from_packed_experts(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    adapter, _ = adapter_folder(base, tmp_path / "adapter")
    loratool.merge(base, [adapter], tmp_path / "tuned", dtype="float32")
    loratool.extract(base, tmp_path / "tuned", tmp_path / "found", rank=4, dtype="float32")
    loratool.merge(base, [tmp_path / "found"], tmp_path / "again", dtype="float32")
    first, second = (load_file(tmp_path / p / "model.safetensors") for p in ("tuned", "again"))
    plain = load_file(base / "model.safetensors")
    for name, tensor in first.items():
        change = (second[name] - tensor).norm()
        original = plain.get(name)
        if original is None:
            blocks, scales = (plain[f"{name}_{part}"] for part in ("blocks", "scales"))
            original = convert_moe_packed_tensors(blocks, scales)
        assert change <= 1e-4 * (tensor - original.float()).norm() + 1e-6
