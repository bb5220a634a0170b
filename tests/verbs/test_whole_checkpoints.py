"""Files that hold a model and the factors of an adapter in one: as either, and folded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import BaseModelError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
FORMS: Final = {
    "PEFT's state dict": ("base_model.model.", ".base_layer.weight", ".lora_{}.default.weight"),
    "without its prefix": ("", ".base_layer.weight", ".lora_{}.default.weight"),
    "w0": ("", ".w0.weight", ".lora_{}.weight"),
    "loralib": ("", ".weight", ".lora_{}"),
    "an inner linear layer": ("", ".linear.weight", ".lora_{}"),
}


def tensors_of() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights of a model, and the factors of two of its modules."""
    weights = {
        "model.embed_tokens.weight": torch.randn(20, 8),
        f"{Q}.weight": torch.randn(8, 8),
        f"{V}.weight": torch.randn(4, 8),
        "model.layers.0.self_attn.k_proj.weight": torch.randn(4, 8),
        "model.norm.weight": torch.randn(8),
        "lm_head.weight": torch.randn(20, 8),
    }
    factors = {}
    for name, out in ((Q, 8), (V, 4)):
        factors |= {f"{name} A": torch.randn(2, 8), f"{name} B": torch.randn(out, 2)}
    return weights, factors


def write(form: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write both in one file; return it, and the weights with the factors folded in."""
    prefix, weight, factor = FORMS[form]
    weights, factors = tensors_of()
    tensors = {}
    for name, value in weights.items():
        module = name.removesuffix(".weight")
        tensors[prefix + (module + weight if module in (Q, V) else name)] = value
    for name, value in factors.items():
        module, _, side = name.partition(" ")
        tensors[prefix + module + factor.format(side)] = value
    path = folder / "whole.safetensors"
    save_file(tensors, path)
    folded = dict(weights)
    for name in (Q, V):
        folded[f"{name}.weight"] = (
            weights[f"{name}.weight"] + factors[f"{name} B"] @ factors[f"{name} A"]
        )
    return path, folded


def assert_are(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_inspect_says_what_it_is(form: str, tmp_path: Path) -> None:
    path, _ = write(form, tmp_path)
    document: dict[str, Any] = loratool.inspect(path).as_json()
    said = " ".join(document["notes"])
    if document["kind"] == "model":
        assert "4 factors of an adapter beside its weights" in said
    else:
        assert "weights of a base lie beside the factors" in said


def test_as_an_adapter_it_gives_its_factors(form: str, tmp_path: Path) -> None:
    path, folded = write(form, tmp_path)
    adapter = loratool.open_adapter(path)
    assert sorted(site.module for site in adapter.sites) == [Q, V]
    assert adapter.extras == ()
    assert len(adapter.tensors) == 4
    assert any("weights of a base" in note for note in adapter.notes)
    weights = {name: torch.zeros_like(value) for name, value in folded.items()}
    save_file(weights, tmp_path / "other.safetensors")
    loratool.merge(tmp_path / "other.safetensors", [path], tmp_path / "out.safetensors")
    changed = [n for n, v in load_file(tmp_path / "out.safetensors").items() if v.any()]
    assert sorted(changed) == [f"{Q}.weight", f"{V}.weight"]


def test_as_a_base_it_is_refused_with_a_command_that_folds_it(form: str, tmp_path: Path) -> None:
    path, folded = write(form, tmp_path)
    save_file(
        {f"{Q}.lora_A.weight": torch.ones(2, 8), f"{Q}.lora_B.weight": torch.ones(8, 2)},
        tmp_path / "adapter.safetensors",
    )
    with pytest.raises(BaseModelError, match="holds 4 factors of an adapter") as failure:
        loratool.merge(path, [tmp_path / "adapter.safetensors"], tmp_path / "out.safetensors")
    assert f"loratool merge {path} {path} -o OUT" in (failure.value.hint or "")
    loratool.merge(path, [path], tmp_path / "folded.safetensors")
    assert_are(load_file(tmp_path / "folded.safetensors"), folded)
    loratool.merge(
        tmp_path / "folded.safetensors",
        [tmp_path / "adapter.safetensors"],
        tmp_path / "out.safetensors",
    )


def test_what_was_trained_as_a_whole_stays_an_extra(tmp_path: Path) -> None:
    path, folded = write("PEFT's state dict", tmp_path)
    tensors = load_file(path)
    head = tensors.pop("base_model.model.lm_head.weight")
    tensors["base_model.model.lm_head.original_module.weight"] = head
    tensors["base_model.model.lm_head.modules_to_save.default.weight"] = head + 1
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    adapter = loratool.open_adapter(folder)
    full = [extra.name for extra in adapter.extras if extra.kind.value == "full"]
    assert full == ["lm_head.weight"]
    loratool.merge(folder / "adapter_model.safetensors", [folder], tmp_path / "folded.safetensors")
    found = load_file(tmp_path / "folded.safetensors")
    torch.testing.assert_close(found["lm_head.weight"], head + 1)
    folded["lm_head.weight"] = head + 1
    assert_are(found, folded)


def test_a_copy_of_the_embedding_is_peft_s_own(tmp_path: Path) -> None:
    """PEFT stores it beside the factors, and it is what these were trained on."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    key = "base_model.model.model.embed_tokens"
    tensors = {
        f"{key}.base_layer.weight": torch.randn(20, 8),
        f"{key}.lora_embedding_A": torch.randn(2, 20),
        f"{key}.lora_embedding_B": torch.randn(8, 2),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    )
    kinds = [extra.kind.value for extra in loratool.open_adapter(folder).extras]
    assert kinds == ["base copy"]
