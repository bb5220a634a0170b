"""AdapterHub's adapters: names, and the scale as the library loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deltas import dense_deltas, relative_error
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.errors import UnsupportedError

QUERY = "bert.encoder.layer.0.attention.self.query"
FUSED = "transformer.h.0.attn.c_attn"


def write(folder: Path, version: str | None = "adapters.1.2.0", **changes: Any) -> dict[str, Any]:
    method = {"architecture": "lora", "r": 4, "alpha": 16, "composition_mode": "add"}
    method |= {"attn_matrices": ["q", "v"], "use_gating": False, "vera_d": None}
    said = {"config": {**method, **changes}, "name": "style", "model_type": "bert"}
    if version is not None:
        said["version"] = version
    tensors = {
        f"{QUERY}.loras.style.lora_A": torch.randn(4, 12),
        f"{QUERY}.loras.style.lora_B": torch.randn(16, 4),
        f"{FUSED}.loras.style.lora_A": torch.randn(8, 12),
        f"{FUSED}.loras.style.lora_B": torch.randn(24, 4),
    }
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_adapter.bin")
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return tensors


@pytest.mark.parametrize(
    ("version", "scale"),
    [
        ("adapters.1.2.0", 4.0),
        ("adapters.1.0.1", 1.0),
        ("adapters.0.2.1", 1.0),
        ("3.2.1", 4.0),
        (None, 4.0),
    ],
)
def test_the_scale_is_that_of_the_library(
    version: str | None, scale: float, tmp_path: Path
) -> None:
    tensors = write(tmp_path / "hub", version)
    loratool.convert(tmp_path / "hub", "peft", tmp_path / "peft")
    a, b = (tensors[f"{FUSED}.loras.style.lora_{side}"].double() for side in "AB")
    fused = torch.zeros(36, 12).double()
    fused[:12], fused[24:] = b[:12] @ a[:4], b[12:] @ a[4:]
    a, b = (tensors[f"{QUERY}.loras.style.lora_{side}"].double() for side in "AB")
    truth = {QUERY: scale * (b @ a), FUSED: scale * fused}
    assert relative_error(dense_deltas(tmp_path / "peft"), truth) < 1e-6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"composition_mode": "scale", "r": 1}, "composition_mode"),
        ({"use_gating": True}, "gate"),
        ({"vera_d": 0.1}, "VeRA"),
        ({"architecture": "reft"}, "reft"),
    ],
)
def test_what_is_no_sum_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    write(tmp_path / "hub", **changes)
    with pytest.raises(UnsupportedError, match=words):
        loratool.open_adapter(tmp_path / "hub")


@pytest.mark.parametrize("is_dora", [False, True])
def test_it_is_written_as_the_library_loads_it(is_dora: bool, tmp_path: Path) -> None:
    tensors = {}
    for leaf, out, into in (("attention.self.query", 16, 12), ("output.dense", 12, 20)):
        name = f"base_model.model.bert.encoder.layer.0.{leaf}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, into)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 4)
        if is_dora:
            tensors[f"{name}.lora_magnitude_vector"] = torch.rand(out)
    (tmp_path / "peft").mkdir()
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_dora": is_dora}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(said))
    loratool.convert(tmp_path / "peft", "adapterhub", tmp_path / "hub")
    written = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    method = written["config"]
    assert (method["r"], method["alpha"], method["attn_matrices"]) == (4, 6, ["q"])
    assert (method["selfattn_lora"], method["output_lora"]) == (True, True)
    assert (method["intermediate_lora"], method["use_dora"]) == (False, is_dora)
    assert written["version"] == "adapters.1.3.0"
    found = torch.load(tmp_path / "hub" / "pytorch_adapter.bin", weights_only=True)
    key = f"{QUERY}.loras.{written['name']}"
    assert torch.equal(found[f"{key}.lora_A"], tensors[f"base_model.model.{QUERY}.lora_A.weight"])
    if is_dora:
        assert found[f"{key}.m.weight"].shape == (16, 1)
    loratool.convert(tmp_path / "hub", "peft", tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], value) for key, value in tensors.items())


def test_merged_projections_are_written_as_it_stacks_them(tmp_path: Path) -> None:
    tensors = {f"{FUSED}.lora_A.weight": torch.randn(4, 12)}
    tensors[f"{FUSED}.lora_B.weight"] = torch.randn(36, 4)
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.convert(tmp_path / "a.safetensors", "adapterhub", tmp_path / "hub")
    found = torch.load(tmp_path / "hub" / "pytorch_adapter.bin", weights_only=True)
    assert found[f"{FUSED}.loras.default.lora_A"].shape == (12, 12)
    loratool.convert(tmp_path / "hub", "peft", tmp_path / "peft")
    a, b = (tensors[f"{FUSED}.lora_{side}.weight"].double() for side in "AB")
    assert relative_error(dense_deltas(tmp_path / "peft"), {FUSED: b @ a}) < 1e-6


def test_a_module_that_the_library_does_not_adapt_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj"
    other = "model.layers.0.self_attn.q_proj"
    save_file(lora(name, 8, 6) | lora(other, 8, 6), tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match="queries, keys, values and MLPs") as caught:
        loratool.convert(tmp_path / "a.safetensors", "adapterhub", tmp_path / "hub")
    assert "--drop" in str(caught.value.hint)
