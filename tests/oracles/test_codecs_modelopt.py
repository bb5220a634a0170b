"""NVFP4 and MXFP4 as modelopt has stored them, given back, and as they are written here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from coded_files import matrix_of, weight_in, written_again
from safetensors import safe_open
from samples import lora

import loratool

RECORDED = Path(__file__).parents[2] / "fixtures" / "quantised" / "modelopt.safetensors"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
CONFIGS = {
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "mxfp4": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
}


def recorded(kind: str) -> dict[str, torch.Tensor]:
    with safe_open(RECORDED, "pt") as file:
        keys = [key for key in file.keys() if key.startswith(kind)]  # noqa: SIM118
        return {key.removeprefix(f"{kind}."): file.get_tensor(key) for key in keys}


def made(kind: str, folder: Path):
    parts = recorded(kind)
    original, truth = parts.pop("original"), parts.pop("truth")
    tensors = {f"m.{leaf}": part for leaf, part in parts.items()}
    weight = weight_in(folder, tensors, CONFIGS[kind], "m.weight")
    return weight, parts, original.double().numpy(), truth.double().numpy()


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_weight_is_what_modelopt_makes_of_it(kind: str, tmp_path: Path) -> None:
    weight, _, _, truth = made(kind, tmp_path)
    np.testing.assert_allclose(matrix_of(weight), truth, rtol=3e-7, atol=1e-12)


def test_the_scale_of_the_whole_multiplies(tmp_path: Path) -> None:
    weight, _, original, _ = made("nvfp4", tmp_path)
    error = np.linalg.norm(matrix_of(weight) - original) / np.linalg.norm(original)
    assert error < 0.11


def test_nvfp4_is_written_as_modelopt_writes_it(tmp_path: Path) -> None:
    weight, parts, original, _ = made("nvfp4", tmp_path)
    again = written_again(weight, original)
    assert np.array_equal(again["weight_scale"], parts["weight_scale"].view(torch.uint8).numpy())
    assert again["weight_scale_2"] == parts["weight_scale_2"].numpy()
    for shift in (0, 4):
        ours, theirs = (E2M1[a >> shift & 15] for a in (again["weight"], parts["weight"].numpy()))
        assert np.array_equal(ours, theirs)


def test_mxfp4_is_written_at_least_as_well(tmp_path: Path) -> None:
    weight, _, original, truth = made("mxfp4", tmp_path)
    again = written_again(weight, original)
    scales = np.ldexp(1.0, again["scales"].astype(int) - 127).repeat(32, axis=1)
    nibbles = np.stack([again["codes"] & 15, again["codes"] >> 4], axis=2).reshape(original.shape)
    ours = np.square(E2M1[nibbles] * scales - original).reshape(-1, 32).sum(axis=1)
    theirs = np.square(truth - original).reshape(-1, 32).sum(axis=1)
    assert (ours <= theirs * (1 + 1e-6)).all()


def test_a_model_of_modelopt_is_merged(make_adapter, tmp_path: Path) -> None:
    """Its configuration lies in a file of its own."""
    _, _, _, truth = made("nvfp4", tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (tmp_path / "base" / "hf_quant_config.json").write_text(json.dumps(said))
    factors = lora("m", 12, 96)
    out = tmp_path / "out"
    loratool.merge(tmp_path / "base", [make_adapter(factors)], out, dtype="float32")
    down, up = (t.double().numpy() for t in factors.values())
    with safe_open(out / "model.safetensors", "np") as file:
        assert list(file.keys()) == ["m.weight"]
        found = file.get_tensor("m.weight")
    np.testing.assert_allclose(found, truth + 2 * up @ down, rtol=1e-5, atol=1e-5)
    assert not (out / "hf_quant_config.json").exists()
