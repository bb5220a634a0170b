"""litgpt's own merge of every kind of model that it has, recorded, and what it makes of ours."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
import torch
from deltas import dense_deltas
from safetensors.torch import load_file, save_file
from samples import FIXTURES

import loratool
from loratool.errors import LoratoolError
from loratool.files.yaml import read_flat_yaml

PLACE: Final = FIXTURES / "litgpt"
CASES: Final = sorted(path.name for path in PLACE.iterdir() if path.is_dir())
CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "gemma-2": {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 2,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 2,
    },
    "pythia": {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"},
    "falcon-7b": {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "multi_query": True,
        "num_kv_heads": 4,
    },
    "falcon-40b": {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "multi_query": True,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "phi-2": {"architectures": ["PhiForCausalLM"], "model_type": "phi"},
    "phi-3": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"},
}
GROUPED: Final = ("llama", "gemma-2", "qwen3", "qwen3-moe", "mixtral", "phi-3")


def base_of(case: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a model of zeros that the deltas fit; return the deltas too."""
    kind = case.rpartition("-")[0]
    truth = load_file(PLACE / case / "deltas.safetensors")
    config = {"num_attention_heads": 4, "head_dim": 4, "hidden_size": 12, "num_hidden_layers": 1}
    config |= {"tie_word_embeddings": False}
    config |= {"num_key_value_heads": 2} if kind in GROUPED else {}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | CONFIGS[kind]))
    weights = {name: torch.zeros_like(value) for name, value in truth.items()}
    save_file(weights, folder / "model.safetensors")
    return folder, truth


@cache
def recording() -> ModuleType:
    """Return the script that runs litgpt."""
    for name in ("litgpt.lora", "litgpt.scripts.convert_lit_checkpoint"):
        pytest.importorskip(name, exc_type=ImportError)
    spec = importlib.util.spec_from_file_location("litgpt_record", PLACE / "record.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_merged_it_is_what_litgpt_makes_of_it(case: str, is_told: bool, tmp_path: Path) -> None:
    base, truth = base_of(case, tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"):
        if is_told or name != "model_config.yaml":
            (adapter / name).write_bytes((PLACE / case / name).read_bytes())
    loratool.merge(base, [adapter], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == truth.keys()
    for name, delta in truth.items():
        torch.testing.assert_close(merged[name], delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_without_the_base_what_litgpt_says_is_enough(case: str, tmp_path: Path) -> None:
    truth = load_file(PLACE / case / "deltas.safetensors")
    if case.startswith("phi-3"):
        truth = apart(truth)
    loratool.convert(PLACE / case, "peft", tmp_path / "peft")
    found = dense_deltas(tmp_path / "peft")
    assert {f"{name}.weight" for name, delta in found.items() if delta.any()} == truth.keys()
    for name, delta in truth.items():
        module = name.removesuffix(".weight")
        torch.testing.assert_close(found[module].float(), delta, rtol=1e-5, atol=1e-5)


def apart(truth: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return Phi-3's projections one by one, those that are not adapted left out."""
    found = {}
    for name, value in truth.items():
        if "qkv_proj" in name:
            parts = zip("qkv", value.split([16, 8, 8]), strict=True)
            found |= {name.replace("qkv", side): part for side, part in parts if part.any()}
        elif "gate_up_proj" in name:
            halves = zip(("gate", "up"), value.chunk(2), strict=True)
            found |= {name.replace("gate_up", side): half for side, half in halves}
        else:
            found[name] = value
    return found


@pytest.mark.parametrize("case", CASES)
def test_straight_back_factors_are_those_that_they_were(case: str, tmp_path: Path) -> None:
    base, _ = base_of(case, tmp_path / "base")
    loratool.convert(PLACE / case, "litgpt", tmp_path / "again", base=base)
    one = torch.load(PLACE / case / "lit_model.pth.lora", weights_only=True)["model"]
    two = torch.load(tmp_path / "again" / "lit_model.pth.lora", weights_only=True)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_by_way_of_peft_litgpt_merges_the_same(case: str, tmp_path: Path) -> None:
    script = recording()
    base, truth = base_of(case, tmp_path / "base")
    loratool.convert(PLACE / case, "peft", tmp_path / "peft", base=base)
    loratool.convert(tmp_path / "peft", "litgpt", tmp_path / "lit", base=base)
    said = read_flat_yaml(tmp_path / "lit" / "hyperparameters.yaml")
    config = {key: value for key, value in said.items() if key.startswith("lora_")}
    kind = case.rpartition("-")[0]
    model = script.model_of(kind, config)
    state = torch.load(tmp_path / "lit" / "lit_model.pth.lora", weights_only=True)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if "lora_" in name]
    found = script.deltas(model, kind)
    assert found.keys() == truth.keys()
    for name, delta in truth.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-4, atol=1e-4)


def test_a_base_of_other_heads_and_one_that_litgpt_does_not_have(tmp_path: Path) -> None:
    base, _ = base_of("pythia-qkv", tmp_path / "base")
    loratool.convert(PLACE / "pythia-qkv", "peft", tmp_path / "peft", base=base)
    config = json.loads((base / "config.json").read_text())
    for change, words in (
        ({"num_attention_heads": 6, "hidden_size": 24}, "has 48 rows, expected 72"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
    ):
        (base / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(LoratoolError, match=words):
            loratool.convert(tmp_path / "peft", "litgpt", tmp_path / "lit", base=base)
