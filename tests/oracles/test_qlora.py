"""QLoRA: transformers quantises, PEFT trains, loratool merges, transformers loads the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import loratool

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of libraries, about machines without a GPU
]

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4-in-floats": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


def prepared(kind: str, folder: Path) -> tuple[Path, Path, torch.Tensor, dict[str, torch.Tensor]]:
    """Write a quantised base and an adapter.

    Returns:
        Both, what they make of a few tokens, and the weights that they stand for, as bitsandbytes
        and PEFT have them.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "plain")
    settings = BitsAndBytesConfig(**KINDS[kind], bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder / "base")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    tuned = get_peft_model(model, lora)
    tuned.save_pretrained(folder / "adapter")
    weights = {}
    for name, module in tuned.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.base_layer.weight
            base = dequantize_bnb_weight(weight, state=getattr(module.base_layer, "state", None))
            delta = module.get_delta_weight("default").detach()
            weights[f"{name}.weight"] = base.float() + delta
    # The first call of a layer of 4 bits changes the order of its codes.
    with torch.no_grad():
        expected = tuned(torch.arange(16)[None]).logits.float()
    return folder / "base", folder / "adapter", expected, weights


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_merged_model_says_what_base_and_adapter_said(kind: str, tmp_path: Path) -> None:
    base, adapter, expected, weights = prepared(kind, tmp_path)
    report = loratool.merge(base, [adapter], tmp_path / "out", dtype="float32")
    assert report.merged == len(weights) == 14
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in weights.items():
        assert (merged[name] - weight).abs().max() <= 1e-6 * weight.abs().max()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    with torch.no_grad():
        found = model(torch.arange(16)[None]).logits
    # LLM.int8() rounds inputs too, and the kernel for 4 bits computes in bfloat16.
    assert (found - expected).norm() <= 0.05 * expected.norm()
    assert not loratool.verify(tmp_path / "out", base=base, adapters=[adapter])


def test_what_stays_in_16_bits_keeps_its_bytes_and_the_rest_becomes_bfloat16(
    tmp_path: Path,
) -> None:
    base, adapter, *_ = prepared("nf4-nested", tmp_path)
    loratool.merge(base, [adapter], tmp_path / "out", dtype=None)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert sorted(after) == sorted(plain)
    assert {name: t.shape for name, t in after.items()} == {n: t.shape for n, t in plain.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert before[name].is_floating_point()
        assert torch.equal(after[name], before[name])
    found = loratool.inspect(base).as_json()
    assert found["parameters"] == sum(t.numel() for t in plain.values())
    assert found["quantization"] == {
        "method": "bitsandbytes",
        "format": "nf4",
        "modules": 14,
    }


def test_the_same_adapter_merges_into_the_original_too(tmp_path: Path) -> None:
    _, adapter, *_ = prepared("nf4", tmp_path)
    loratool.merge(tmp_path / "plain", [adapter], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    tuned = PeftModel.from_pretrained(plain, adapter)
    with torch.no_grad():
        found, expected = (m(torch.arange(16)[None]).logits for m in (model, tuned))
    assert (found - expected).norm() <= 1e-4 * expected.norm()
