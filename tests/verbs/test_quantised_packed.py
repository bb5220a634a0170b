"""Every verb on models whose weights are whole numbers in words, or floats of four bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coded import MODULE, Sample
from coded.awq import samples as awq_samples
from coded.compressed_int import samples as compressed_int_samples
from coded.compressed_pack import samples as compressed_pack_samples
from coded.gptq import samples as gptq_samples
from coded.mxfp4 import samples as mxfp4_samples
from coded.nvfp4 import samples as nvfp4_samples
from coded_files import matrix_of
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.base.model import open_model
from loratool.codecs.codec import CodedTensor
from loratool.errors import UnsupportedError

Make = Callable[..., Path]
WANTED = (
    *("4bits-v1", "4bits-act-order", "3bits-v2", "padded"),
    *("gemm", "gemv-64"),
    *("int4-asymmetric", "int3-channel", "int4-act-order"),
    *("channel", "channel-asymmetric"),
    *("modelopt", "compressed", "pack"),
)
SAMPLES = [
    sample
    for samples in (
        *(gptq_samples, awq_samples, compressed_pack_samples),
        *(compressed_int_samples, nvfp4_samples, mxfp4_samples),
    )
    for sample in samples()
    if sample.label in WANTED
]
WRITTEN = ("nvfp4", "mxfp4")
every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)


def folder(sample: Sample, path: Path) -> Path:
    """Write the tensors of a sample and its configuration."""
    path.mkdir()
    header, offset = {}, 0
    for name, (dtype, shape, data) in sample.tensors.items():
        ends = [offset, offset + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": ends}
        offset += len(data)
    text = json.dumps(header).encode()
    blob = b"".join(data for _, _, data in sample.tensors.values())
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + blob)
    config = {"model_type": "llama", "quantization_config": dict(sample.said.quantization)}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_all_samples_are_there() -> None:
    assert len(SAMPLES) == len(WANTED)


@every_sample
def test_a_merge_writes_plain_numbers(sample: Sample, make_adapter: Make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = folder(sample, tmp_path / "base")
    factors = lora(MODULE, *sample.truth.shape)
    adapter = make_adapter(factors)
    assert not [f for f in loratool.validate(adapter, base=base) if f.severity == "error"]
    loratool.merge(base, [adapter], tmp_path / "out", dtype="float32")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    others = {"model.norm.weight"} & set(sample.tensors)
    assert set(merged) == {sample.name, *others}
    down, up = (t.double().numpy() for t in factors.values())
    wanted = sample.truth + 2 * up @ down
    np.testing.assert_allclose(merged[sample.name].double().numpy(), wanted, rtol=1e-6, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "model_type": "llama",
        "dtype": "float32",
    }
    assert not loratool.verify(tmp_path / "out", base=base, adapters=[adapter])


@every_sample
def test_inspect_counts_what_the_codes_stand_for(sample: Sample, tmp_path: Path) -> None:
    found = loratool.inspect(folder(sample, tmp_path / "base")).as_json()
    norm = sample.tensors.get("model.norm.weight")
    assert found["parameters"] == sample.truth.size + (norm[1][0] if norm else 0)
    assert found["quantization"]["modules"] == 1


@every_sample
@pytest.mark.parametrize("coded", ["base", "tuned"])
def test_extract_with_one_side_coded(sample: Sample, coded: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    out, into = sample.truth.shape
    delta = random.standard_normal((out, 2)) @ random.standard_normal((2, into))
    plain = sample.truth + (delta if coded == "base" else -delta)
    tensors = {sample.name: plain.astype("<f4")}
    paths = {"base": folder(sample, tmp_path / "coded"), "tuned": tmp_path / "plain"}
    paths["tuned"].mkdir()
    if "model.norm.weight" in sample.tensors:
        tensors["model.norm.weight"] = np.zeros(8, "<f4")
    save_numpy(tensors, paths["tuned"] / "model.safetensors")
    (paths["tuned"] / "config.json").write_text('{"model_type": "llama"}')
    first, second = paths.values() if coded == "base" else reversed(paths.values())
    loratool.extract(first, second, tmp_path / "out", rank=2, dtype="float32")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = f"base_model.model.{MODULE}.lora_"
    made = (found[f"{key}B.weight"].double() @ found[f"{key}A.weight"].double()).numpy()
    assert np.linalg.norm(made - delta) <= 1e-5 * np.linalg.norm(delta)


@every_sample
def test_keep_writes_the_codes_again_or_says_what_to_do(
    sample: Sample, make_adapter: Make, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = folder(sample, tmp_path / "base")
    factors = lora(MODULE, *sample.truth.shape)
    size = np.abs(sample.truth).max() / 10
    adapter = make_adapter({name: t * size**0.5 for name, t in factors.items()})
    if sample.codec not in WRITTEN:
        with pytest.raises(UnsupportedError, match="calibration data") as caught:
            loratool.merge(base, [adapter], tmp_path / "out", quantized="keep")
        assert "--quantized dequantize" in (caught.value.hint or "")
        return
    report = loratool.merge(base, [adapter], tmp_path / "out", quantized="keep")
    assert report.retention is not None and report.retention > 0.8
    before, after = (load_file(p / "model.safetensors") for p in (base, tmp_path / "out"))
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {
        k: (t.dtype, t.shape) for k, t in after.items()
    }
    weight = open_model(tmp_path / "out").tensors[sample.name]
    assert isinstance(weight, CodedTensor)
    found = matrix_of(weight)
    down, up = (t.double().numpy() * size**0.5 for t in factors.values())
    wanted = sample.truth + 2 * up @ down
    assert np.linalg.norm(found - wanted) < 0.13 * np.linalg.norm(wanted)
    assert not loratool.verify(tmp_path / "out", base=base, adapters=[adapter])


@pytest.mark.parametrize(
    ("label", "place"),
    [
        ("4bits-v2", "quantize_config.json"),
        ("gemv-64", "quant_config.json"),
        ("int4-act-order", "compression_config"),
    ],
)
def test_configurations_of_old_tools_are_read_and_go(
    label: str, place: str, make_adapter: Make, tmp_path: Path
) -> None:
    every = (*gptq_samples(), *awq_samples(), *compressed_pack_samples())
    sample = next(sample for sample in every if sample.label == label)
    base = folder(sample, tmp_path / "base")
    said: dict[str, Any] = dict(sample.said.quantization)
    config: dict[str, Any] = {"model_type": "llama", "torch_dtype": "float16"}
    if place.endswith(".json"):
        del said["quant_method"]
        (base / place).write_text(json.dumps(said))
    else:
        config[place] = said
    (base / "config.json").write_text(json.dumps(config))
    factors = lora(MODULE, *sample.truth.shape)
    loratool.merge(base, [make_adapter(factors)], tmp_path / "out", dtype="float32")
    merged = load_file(tmp_path / "out" / "model.safetensors")[sample.name].double().numpy()
    down, up = (t.double().numpy() for t in factors.values())
    np.testing.assert_allclose(merged, sample.truth + 2 * up @ down, rtol=1e-6, atol=1e-5)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"model_type": "llama", "torch_dtype": "float32"}
    assert not (tmp_path / "out" / place).exists()


def test_plain_weights_among_coded_ones_stay(make_adapter: Make, tmp_path: Path) -> None:
    sample = SAMPLES[0]
    base = folder(sample, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    head = torch.randn(9, 5).bfloat16()
    save_file(tensors | {"lm_head.weight": head}, base / "model.safetensors")
    loratool.merge(base, [make_adapter(lora(MODULE, *sample.truth.shape))], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], head)
    assert merged[sample.name].dtype == torch.float16
