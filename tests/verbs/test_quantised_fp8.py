"""Verbs over models in FP8 of every scaling, and in ComfyUI's formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from coded import Sample
from coded_files import matrix_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.base.model import open_model
from loratool.errors import UnsupportedError
from loratool.files.dtypes import DTYPES

Make = Callable[..., Path]
CODECS = ("fp8_block", "fp8_scaled", "fp8_plain", "comfy_nvfp4", "comfy_mxfp8", "comfy_int8")
MATRICES = [
    sample
    for codec in CODECS
    for sample in import_module(f"coded.{codec}").samples()
    if sample.truth.ndim == 2 and "gate and up" not in sample.label
]
LOST = {"comfy-nvfp4": 0.12}
"""What rounding loses at most, of the norm; of FP8 it is less."""
every = pytest.mark.parametrize("sample", MATRICES, ids=str)
of_each = pytest.mark.parametrize(
    "sample", {sample.codec: sample for sample in MATRICES}.values(), ids=str
)


def base_of(sample: Sample, folder: Path) -> Path:
    folder.mkdir()
    tensors = {}
    for name, (dtype, shape, data) in sample.tensors.items():
        kind = getattr(torch, DTYPES[dtype].torch_name or "")
        flat = torch.frombuffer(bytearray(data), dtype=kind) if data else torch.empty(0, dtype=kind)
        tensors[name] = flat.reshape(shape)
    metadata = {"format": "pt", **sample.said.metadata}
    save_file(tensors, folder / "model.safetensors", metadata)
    config = {"model_type": "llama"}
    if sample.said.quantization:
        config["quantization_config"] = dict(sample.said.quantization)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter_of(sample: Sample, make_adapter: Make) -> tuple[Path, np.ndarray]:
    """Return an adapter, and what it adds: about as much as there is."""
    made = lora(sample.module, *sample.truth.shape)
    size = (float(np.abs(sample.truth).mean()) / 4) ** 0.5
    made = {name: size * factor for name, factor in made.items()}
    down, up = (factor.double().numpy() for factor in made.values())
    return make_adapter(made), 2 * up @ down


@every
def test_a_merge_writes_plain_numbers(sample: Sample, make_adapter: Make, tmp_path: Path) -> None:
    base = base_of(sample, tmp_path / "base")
    adapter, delta = adapter_of(sample, make_adapter)
    out = tmp_path / "out"
    report = loratool.merge(base, [adapter], out, dtype="float32")
    with safe_open(out / "model.safetensors", "np") as file:
        names, metadata = list(file.keys()), file.metadata()
        found = file.get_tensor(sample.name)
    others = {sample.name, "model.norm.weight", f"{sample.module}.bias"}
    assert set(names) <= others and sample.name in names
    assert metadata == {"format": "pt"}
    wanted = sample.truth + delta
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert any("1 weights in" in note or "1 weight in" in note for note in report.notes)
    assert not loratool.verify(out, base=base, adapters=[adapter])


@every
def test_keep_writes_the_same_format(sample: Sample, make_adapter: Make, tmp_path: Path) -> None:
    base = base_of(sample, tmp_path / "base")
    adapter, delta = adapter_of(sample, make_adapter)
    out = tmp_path / "out"
    if sample.codec == "comfy_int8":
        with pytest.raises(UnsupportedError, match="lose most of a small change") as caught:
            loratool.merge(base, [adapter], out, quantized="keep")
        assert caught.value.hint
        return
    loratool.merge(base, [adapter], out, quantized="keep")
    kept = [safe_open(folder / "model.safetensors", "np") for folder in (base, out)]
    assert list(kept[0].keys()) == list(kept[1].keys())
    assert kept[0].metadata() == kept[1].metadata()
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert not loratool.verify(out, base=base, adapters=[adapter])
    found = matrix_of(open_model(out).tensors[sample.name])
    wanted = sample.truth + delta
    limit = LOST.get(loratool.inspect(base).as_json()["quantization"]["format"], 0.08)
    assert np.linalg.norm(found - wanted) <= limit * np.linalg.norm(wanted)


@of_each
def test_validate_inspect_and_extract(sample: Sample, make_adapter: Make, tmp_path: Path) -> None:
    base = base_of(sample, tmp_path / "base")
    adapter, delta = adapter_of(sample, make_adapter)
    assert not [f for f in loratool.validate(adapter, base=base) if f.code.startswith("LT02")]
    wrong = make_adapter(lora(sample.module, sample.truth.shape[0] + 1, 5), "wrong")
    assert "LT022" in [finding.code for finding in loratool.validate(wrong, base=base)]
    shown = loratool.inspect(base).as_json()
    assert shown["quantization"]["modules"] == 1
    assert shown["parameters"] >= sample.truth.size
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    plain = {sample.name: torch.from_numpy(sample.truth + delta).float()}
    save_file(plain, tuned / "model.safetensors")
    (tuned / "config.json").write_text("{}")
    loratool.extract(base, tuned, tmp_path / "lora", rank=4, dtype="float32")
    found = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    up, down = (
        next(t.double().numpy() for k, t in found.items() if f"lora_{kind}" in k) for kind in "BA"
    )
    assert np.linalg.norm(up @ down - delta) <= 1e-3 * np.linalg.norm(delta)
