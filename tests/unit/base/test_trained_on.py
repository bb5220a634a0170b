"""What is said of quantised bases that an adapter names, or is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from samples import lora

import loratool
from loratool.base.trained_on import quantised_name

Make = Callable[..., Path]
MODULE = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("unsloth/Llama-3.2-1B-bnb-4bit", "bnb-4bit"),
        ("unsloth/llama-3-8b-Instruct-bnb-4bit", "bnb-4bit"),
        ("TheBloke/Llama-2-7B-GPTQ", "GPTQ"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "AWQ"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "GPTQ"),
        ("RedHatAI/Meta-Llama-3-8B-FP8-dynamic", "FP8-dynamic"),
        ("RedHatAI/Llama-3-8B-quantized.w4a16", "w4a16"),
        ("mlx-community/Mistral-7B-Instruct-v0.3-4bit", "4bit"),
        ("someone/model.Q4_K_M.gguf", "Q4_K_M"),
        ("/models/llama_nf4", "nf4"),
        ("meta-llama/Llama-2-7b-hf", None),
        ("org/awqward-4bits-of-wisdom", None),
        ("org/mint8x", None),
        (None, None),
        ("", None),
    ],
)
def test_names_of_quantised_models(name: str | None, kind: str | None) -> None:
    assert quantised_name(name) == kind


def base_of(make_base: Make, kind: str) -> Path:
    if kind == "plain":
        return make_base({f"{MODULE}.weight": torch.randn(8, 8)}, None, kind)
    tensors = {
        f"{MODULE}.weight": torch.randn(8, 8).to(torch.float8_e4m3fn),
        f"{MODULE}.weight_scale_inv": torch.rand(1, 1),
    }
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    return make_base(tensors, config, kind)


@pytest.mark.parametrize(
    ("recorded", "kind", "words"),
    [
        ("org/base-bnb-4bit", None, "merged into that it is what training saw"),
        ("org/base-bnb-4bit", "plain", "this one is not"),
        ("org/base-FP8", "coded", "as this one is"),
        ("org/base", "coded", "comes on top"),
        (None, "coded", "names no base"),
        ("org/base", "plain", None),
        ("org/base", None, None),
    ],
)
def test_validate_and_merge_say_which_base_training_saw(
    recorded: str | None,
    kind: str | None,
    words: str | None,
    make_base: Make,
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    adapter = make_adapter(lora(MODULE, 8, 8))
    path = adapter / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": recorded})
    )
    base = base_of(make_base, kind) if kind is not None else None
    found = [f for f in loratool.validate(adapter, base=base) if f.code == "LT035"]
    assert [f.severity for f in found] == ["info"] * (words is not None)
    assert words is None or words in found[0].message
    if base is not None:
        notes = loratool.merge(base, [adapter], tmp_path / "out").notes
        assert (
            any(words in note for note in notes) if words else not any("train" in n for n in notes)
        )
