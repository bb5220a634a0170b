"""litgpt's own merge of every kind of model that it has, recorded, and what it makes of ours."""

from __future__ import annotations

import importlib.util
import json
import sys
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import pytest
import torch
from deltas import dense_deltas
from safetensors.torch import load_file, save_file
from samples import FIXTURES

import loratool
from loratool.errors import LoratoolError
from loratool.files.yaml import read_flat_yaml

PLACE: Final = FIXTURES / "litgpt"
CASES: Final[dict[str, Any]] = json.loads((PLACE / "deltas.json").read_text())
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


def numbers(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Return the numbers of a factor, as they were recorded with."""
    drawn = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(drawn.integers(-2, 3, shape).astype(np.float32))


def checksum(value: torch.Tensor) -> str:
    return f"{zlib.crc32((value.float() + 0.0).contiguous().numpy().tobytes()):08x}"


def adapter_of(case: str, folder: Path, *, is_told: bool = True) -> Path:
    """Write an adapter as litgpt saves it."""
    folder.mkdir()
    tensors = {name: numbers(name, shape) for name, shape in CASES[case]["adapter"].items()}
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    # JSON is YAML too.
    (folder / "hyperparameters.yaml").write_text(json.dumps(CASES[case]["run"]))
    if is_told:
        (folder / "model_config.yaml").write_text(json.dumps(CASES[case]["model"]))
    return folder


def base_of(case: str, folder: Path) -> Path:
    """Write a model of zeros that the deltas fit."""
    kind = case.rpartition("-")[0]
    config = {"num_attention_heads": 4, "head_dim": 4, "hidden_size": 12, "num_hidden_layers": 1}
    config |= {"tie_word_embeddings": False}
    config |= {"num_key_value_heads": 2} if kind in GROUPED else {}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | CONFIGS[kind]))
    weights = {name: torch.zeros(shape) for name, (shape, _) in CASES[case]["deltas"].items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def check(found: dict[str, torch.Tensor], case: str) -> None:
    """Compare deltas with what litgpt made."""
    truth = {name: check for name, (_, check) in CASES[case]["deltas"].items()}
    assert {name: checksum(value) for name, value in found.items()} == truth


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
    base = base_of(case, tmp_path / "base")
    adapter = adapter_of(case, tmp_path / "adapter", is_told=is_told)
    loratool.merge(base, [adapter], tmp_path / "merged")
    check(load_file(tmp_path / "merged" / "model.safetensors"), case)


@pytest.mark.parametrize("case", CASES)
def test_without_the_base_what_litgpt_says_is_enough(case: str, tmp_path: Path) -> None:
    loratool.convert(adapter_of(case, tmp_path / "a"), "peft", tmp_path / "peft")
    found = {f"{name}.weight": d for name, d in dense_deltas(tmp_path / "peft").items()}
    if case.startswith("phi-3"):
        found = together(found)
    check(found, case)


def together(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return Phi-3's projections as the ones that they are in transformers."""
    block = "model.layers.0."
    parts = {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": ("gate", "up")}
    rows = {"q": 16, "k": 8, "v": 8}
    for whole, names in parts.items():
        prefix = f"{block}{whole.partition('.')[0]}."
        values = [
            found.pop(f"{prefix}{name}_proj.weight", torch.zeros(rows.get(name, 0), 12))
            for name in names
        ]
        found[f"{block}{whole}.weight"] = torch.cat(values)
    return found


@pytest.mark.parametrize("case", CASES)
def test_straight_back_factors_are_those_that_they_were(case: str, tmp_path: Path) -> None:
    base, adapter = base_of(case, tmp_path / "base"), adapter_of(case, tmp_path / "a")
    loratool.convert(adapter, "litgpt", tmp_path / "again", base=base)
    one = torch.load(adapter / "lit_model.pth.lora", weights_only=True)["model"]
    two = torch.load(tmp_path / "again" / "lit_model.pth.lora", weights_only=True)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_by_way_of_peft_litgpt_merges_the_same(case: str, tmp_path: Path) -> None:
    script = recording()
    base, adapter = base_of(case, tmp_path / "base"), adapter_of(case, tmp_path / "a")
    loratool.convert(adapter, "peft", tmp_path / "peft", base=base)
    loratool.convert(tmp_path / "peft", "litgpt", tmp_path / "lit", base=base)
    said = read_flat_yaml(tmp_path / "lit" / "hyperparameters.yaml")
    config = {key: value for key, value in said.items() if key.startswith("lora_")}
    kind = case.rpartition("-")[0]
    model = script.model_of(kind, config)
    state = torch.load(tmp_path / "lit" / "lit_model.pth.lora", weights_only=True)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if "lora_" in name]
    check(script.deltas(model, kind), case)


def test_a_base_of_other_heads_and_one_that_litgpt_does_not_have(tmp_path: Path) -> None:
    base = base_of("pythia-qkv", tmp_path / "base")
    loratool.convert(adapter_of("pythia-qkv", tmp_path / "a"), "peft", tmp_path / "peft", base=base)
    config = json.loads((base / "config.json").read_text())
    for change, words in (
        ({"num_attention_heads": 6, "hidden_size": 24}, "has 48 rows, expected 72"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
    ):
        (base / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(LoratoolError, match=words):
            loratool.convert(tmp_path / "peft", "litgpt", tmp_path / "lit", base=base)
