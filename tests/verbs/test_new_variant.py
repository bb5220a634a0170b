"""A variant of no real tool, which is one file: every verb runs with it, nothing else knows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes.finding import find_fake_variants, forget
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import AdapterError, UnsupportedError
from loratool.plan import kernels

CLOSE = 1e-12
SHAPES = {"layers.0.q_proj": (24, 16), "layers.1.down_proj": (10, 40), "h.0.c_fc": (20, 12)}
STRENGTHS = {"layers.0.q_proj": 0.5, "layers.1.down_proj": 1.25, "h.0.c_fc": -0.75}


@pytest.fixture(autouse=True)
def _with_fakes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        find_fake_variants(monkeypatch)
        yield
        forget(monkeypatch)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Linear layers with biases, one of them stored ``(in, out)``."""
    draw = np.random.RandomState(1)
    tensors = {f"{name}.weight": draw.randn(*shape) for name, shape in SHAPES.items()}
    tensors["h.0.c_fc.weight"] = tensors["h.0.c_fc.weight"].T.copy()
    tensors |= {f"{name}.bias": draw.randn(shape[0]) for name, shape in SHAPES.items()}
    tensors["norm.weight"] = draw.randn(3)
    path = tmp_path / "base"
    path.mkdir()
    named = {name: torch.from_numpy(value) for name, value in tensors.items()}
    save_file(named, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return path


def planes() -> dict[str, Any]:
    draw = np.random.RandomState(2)
    return {name: draw.randn(1, shape[1]) for name, shape in SHAPES.items()}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    tensors = {}
    for name, plane in planes().items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.mirror_plane"] = torch.from_numpy(plane)
        tensors[f"{key}.mirror_strength"] = torch.tensor([STRENGTHS[name]]).double()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "MIRROR", "target_modules": list(SHAPES), "mirror_colour": "blue"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def tensors_of(path: Path) -> dict[str, Any]:
    return {k: v.double().numpy() for k, v in load_file(path / "model.safetensors").items()}


def wanted(base: Path, weight: float = 1.0) -> dict[str, Any]:
    """``W + w · s · W (R - 1)`` with ``R = 1 - 2 u uᵀ / ‖u‖²``; biases change their sign."""
    found = tensors_of(base)
    for name, plane in planes().items():
        mirror = np.eye(plane.shape[1]) - 2 * plane.T @ plane / (plane @ plane.T)
        stored = found[f"{name}.weight"]
        rows = stored.T if name == "h.0.c_fc" else stored
        moved = rows + weight * STRENGTHS[name] * (rows @ mirror - rows)
        found[f"{name}.weight"] = moved.T if name == "h.0.c_fc" else moved
        found[f"{name}.bias"] = (1 - 2 * weight) * found[f"{name}.bias"]
    return found


def assert_alike(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.abs(found[name] - value).max() <= CLOSE * np.abs(value).max(), name


def test_inspect_names_it(adapter: Path) -> None:
    document = loratool.inspect(adapter).as_json()
    assert [module["variant"] for module in document["modules"]] == ["mirror"] * 3
    assert sorted(m["in_features"] for m in document["modules"]) == [12, 16, 40]
    assert document["extras"] == []


def test_validate_finds_nothing(base: Path, adapter: Path) -> None:
    assert [f.code for f in loratool.validate(adapter, base=base) if f.is_error] == []
    assert "mirror_colour" not in str(loratool.validate(adapter, base=base))


def test_validate_sees_another_base(base: Path, adapter: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["layers.0.q_proj.weight"] = torch.ones(24, 17)
    save_file(tensors, base / "model.safetensors")
    (found,) = [f for f in loratool.validate(adapter, base=base) if f.is_error]
    assert (found.code, found.where) == ("LT022", "layers.0.q_proj")


@pytest.mark.parametrize("weight", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("elements", [kernels.BLOCK_ELEMENTS, 50])
def test_merge_makes_of_a_weight_what_it_makes(
    weight: float,
    elements: int,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", elements)  # 50: several blocks of each
    output = tmp_path / "merged"
    report = loratool.merge(base, [adapter], output, weights=[weight])
    assert report.merged == 6
    assert_alike(tensors_of(output), wanted(base, weight))
    assert loratool.verify(output, base=base, adapters=[adapter], weights=[weight]) == ()


def test_verify_sees_what_was_not_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    loratool.merge(base, [adapter], tmp_path / "merged", weights=[0.9])
    found = loratool.verify(tmp_path / "merged", base=base, adapters=[adapter])
    assert {finding.code for finding in found} == {"LT105"}
    assert len(found) == 6


def test_it_becomes_a_plain_lora_with_a_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    for options, words in (({}, "--base"), ({"base": base}, "--rank")):
        with pytest.raises(UnsupportedError) as failure:
            loratool.convert(adapter, "peft", tmp_path / "plain", to_lora=True, **options)
        assert words in (failure.value.hint or "")
    # A mirror moves a weight by one outer product.
    loratool.convert(adapter, "peft", tmp_path / "plain", base=base, to_lora=True, rank=1)
    loratool.merge(base, [tmp_path / "plain"], tmp_path / "merged")
    assert_alike(tensors_of(tmp_path / "merged"), wanted(base))
    loratool.truncate(tmp_path / "plain", tmp_path / "short", rank=1)
    loratool.compose([tmp_path / "short"] * 2, tmp_path / "sum", weights=[0.5, 0.5])
    loratool.merge(base, [tmp_path / "sum"], tmp_path / "again")
    assert_alike(tensors_of(tmp_path / "again"), wanted(base))


def test_verbs_without_a_base_say_what_to_do(base: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for call in (
        lambda: loratool.truncate(adapter, output, rank=1),
        lambda: loratool.compose([adapter, adapter], output),
        lambda: loratool.rescale(adapter, output, scale=2.0),
        lambda: loratool.compare([adapter, adapter]),
        lambda: loratool.inspect(adapter, spectrum=True),
        lambda: loratool.convert(adapter, "kohya", tmp_path / "out.safetensors"),
        lambda: loratool.convert(adapter, "peft", output),
    ):
        with pytest.raises((UnsupportedError, AdapterError)) as failure:
            call()
        assert "a mirror of the base's inputs" in str(failure.value)
        assert "--to-lora" in (failure.value.hint or "")
    assert not output.exists()
