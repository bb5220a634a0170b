"""Verbs over models in bitsandbytes' codes and in those of MLX, HQQ, Quanto and torchao."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coded import MODULE, Sample, Tensor, bitsandbytes_4bit, bitsandbytes_8bit, hqq, mlx, quanto
from coded import torchao as torchao_samples
from safetensors.torch import load_file
from samples import lora

import loratool
from loratool.errors import FileFormatError, UnsupportedError

Make = Callable[..., Path]
OTHER = MODULE.replace("up_proj", "gate_proj")
NORM = "model.norm.weight"
CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16"}
ALL = [
    sample
    for room in (bitsandbytes_4bit, bitsandbytes_8bit, mlx, hqq, quanto, torchao_samples)
    for sample in room.samples()
    if sample.truth.ndim == 2 and sample.module == MODULE
]
ONE_OF_EACH = list({sample.codec: sample for sample in reversed(ALL)}.values())

FORMATS = {
    "bitsandbytes_4bit": "nf4",
    "bitsandbytes_8bit": "int8",
    "mlx": "affine-1bit",
    "hqq": "hqq-8bit",
    "quanto": "qint8",
    "torchao": "Float8Tensor",
}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors of any dtype, by their bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        place = [offset, offset + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": place}
        offset += len(data)
    text = json.dumps(header).encode()
    body = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def renamed(text: str) -> str:
    return text.replace(MODULE, OTHER)


def model(sample: Sample, folder: Path) -> Path:
    """Write a model of two coded modules, the same numbers in both, and a norm."""
    folder.mkdir()
    tensors = {**sample.tensors, **{renamed(name): t for name, t in sample.tensors.items()}}
    metadata = {**sample.said.metadata}
    if metadata:
        told = metadata[sample.name]
        names = json.dumps([sample.name, renamed(sample.name), NORM])
        metadata |= {renamed(sample.name): told, "tensor_names": names}
    write(folder / "model.safetensors", tensors, metadata)
    said = {**sample.said.quantization}
    for key in [key for key in said if MODULE in key]:
        said[renamed(key)] = said[key]
    key = "quantization" if sample.codec == "mlx" else "quantization_config"
    (folder / "config.json").write_text(json.dumps(CONFIG | {key: said}))
    return folder


def adapter_of(sample: Sample, make_adapter: Make) -> tuple[Path, np.ndarray]:
    made = lora(MODULE, *sample.truth.shape)
    down, up = (t.double().numpy() for t in made.values())
    return make_adapter(made), 2 * (up @ down)


@pytest.mark.parametrize("sample", ALL, ids=str)
def test_a_merge_writes_plain_numbers(sample: Sample, make_adapter: Make, tmp_path: Path) -> None:
    base = model(sample, tmp_path / "base")
    adapter, delta = adapter_of(sample, make_adapter)
    report = loratool.merge(base, [adapter], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")

    kept = {name for name in sample.tensors if name.endswith(".bias")}
    kept |= {renamed(name) for name in kept} | {NORM}
    assert set(merged) == {sample.name, renamed(sample.name)} | kept
    for name, truth in (
        (sample.name, sample.truth + delta),
        (renamed(sample.name), sample.truth),
    ):
        assert merged[name].dtype == torch.bfloat16
        assert merged[name].shape == truth.shape
        error = np.abs(merged[name].double().numpy() - truth)
        assert (error <= 2.0**-8 * np.abs(truth) * 1.001 + 2e-6 * np.abs(truth).max()).all()
    assert report.merged == 1
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == CONFIG
    header = (tmp_path / "out" / "model.safetensors").read_bytes()[8:]
    told, _ = json.JSONDecoder().raw_decode(header[: header.index(b"}}") + 2].decode())
    assert set(told["__metadata__"]) == {"format"}
    assert not loratool.verify(tmp_path / "out", base=base, adapters=[adapter])


@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
def test_verbs_see_logical_weights(sample: Sample, make_adapter: Make, tmp_path: Path) -> None:
    base = model(sample, tmp_path / "base")
    out, into = sample.truth.shape
    found = loratool.inspect(base).as_json()
    biases = sum(
        shape[0] for name, (_, shape, _) in sample.tensors.items() if name.endswith("bias")
    )
    assert found["parameters"] == 2 * (out * into + biases) + 8
    assert found["quantization"]["modules"] == 2
    assert found["quantization"]["format"] == FORMATS[sample.codec]
    good = make_adapter(lora(MODULE, out, into))
    assert not [f for f in loratool.validate(good, base=base) if f.code.startswith("LT02")]
    bad = make_adapter(lora(MODULE, out + 1, into), "bad")
    assert "LT022" in [finding.code for finding in loratool.validate(bad, base=base)]


@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
def test_keep_is_refused_with_what_to_do(
    sample: Sample, make_adapter: Make, tmp_path: Path
) -> None:
    base = model(sample, tmp_path / "base")
    adapter, _ = adapter_of(sample, make_adapter)
    with pytest.raises(UnsupportedError, match="again") as caught:
        loratool.merge(base, [adapter], tmp_path / "out", quantized="keep")
    assert "--quantized dequantize" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("is_tuned", [False, True])
def test_extract_with_either_side_coded(sample: Sample, is_tuned: bool, tmp_path: Path) -> None:
    coded = model(sample, tmp_path / "coded")
    out, into = sample.truth.shape
    delta = 10 * torch.randn(out, 2).double() @ torch.randn(2, into).double()
    weight = torch.from_numpy(sample.truth)
    plain = {
        sample.name: (weight - delta if is_tuned else weight + delta).float(),
        renamed(sample.name): weight.float(),
        NORM: torch.zeros(8).bfloat16(),
    }
    tensors: dict[str, Tensor] = {
        name: (
            "F32" if t.dtype == torch.float32 else "BF16",
            tuple(t.shape),
            t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, t in plain.items()
    }
    biases = {name: t for name, t in sample.tensors.items() if name.endswith(".bias")}
    tensors |= biases | {renamed(name): t for name, t in biases.items()}
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain" / "model.safetensors", tensors, {})
    order = (tmp_path / "plain", coded) if is_tuned else (coded, tmp_path / "plain")
    loratool.extract(*order, tmp_path / "out", rank=2, dtype="float32")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = f"base_model.model.{MODULE}.lora_"
    made = found[f"{key}B.weight"].double() @ found[f"{key}A.weight"].double()
    assert (made - delta).norm() <= 1e-4 * delta.norm()


def test_a_quantised_embedding_is_read_as_well(make_adapter: Make, tmp_path: Path) -> None:
    module = "model.embed_tokens"
    sample = mlx.sample((24, 64), 4, 32, module=module)
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "model.safetensors", sample.tensors, {})
    config = CONFIG | {"quantization": sample.said.quantization}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    tensors = {
        f"{module}.lora_embedding_A": torch.randn(2, 24),
        f"{module}.lora_embedding_B": torch.randn(64, 2),
    }
    adapter = make_adapter(tensors, r=2, lora_alpha=2)
    loratool.merge(tmp_path / "base", [adapter], tmp_path / "out", dtype="float32")
    merged = load_file(tmp_path / "out" / "model.safetensors")[f"{module}.weight"].double()
    down, up = (t.double() for t in tensors.values())
    truth = torch.from_numpy(sample.truth) + (up @ down).T
    assert (merged - truth).abs().max() <= 1e-6 * truth.abs().max()


def test_damaged_codes_are_named(make_adapter: Make, tmp_path: Path) -> None:
    sample = bitsandbytes_4bit.sample((8, 16))
    base = model(sample.without(f"{sample.name}.absmax"), tmp_path / "base")
    adapter, _ = adapter_of(sample, make_adapter)
    with pytest.raises(FileFormatError, match=f"{MODULE}.*absmax"):
        loratool.merge(base, [adapter], tmp_path / "out")


@pytest.mark.parametrize("has_cut", [False, True], ids=["whole", "in blocks"])
def test_stacks_of_experts_are_changed_expert_by_expert(
    has_cut: bool, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_cut:  # blocks end within an expert, and within a block of codes
        monkeypatch.setattr("loratool.plan.kernels.BLOCK_ELEMENTS", 50)
    module, experts, rank, out, into = "model.layers.0.mlp.experts", 3, 2, 8, 20
    sample = bitsandbytes_4bit.sample((experts, out, into), nested=2, name=f"{module}.down_proj")
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "model.safetensors", sample.tensors, {})
    config = {"model_type": "qwen3_moe", "quantization_config": sample.said.quantization}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    down, up = torch.randn(experts * rank, into), torch.randn(out, experts * rank)
    adapter = make_adapter(
        {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up},
        r=rank,
        lora_alpha=rank,
        target_modules=[],
        target_parameters=["experts.down_proj"],
        peft_version="0.21.2",
    )
    loratool.merge(tmp_path / "base", [adapter], tmp_path / "out", dtype="float32")
    merged = load_file(tmp_path / "out" / "model.safetensors")[sample.name].double()
    downs = down.double().reshape(experts, rank, into)
    ups = up.double().reshape(out, rank, experts)
    truth = torch.from_numpy(sample.truth) + torch.einsum("ore,eri->eoi", ups, downs)
    assert merged.shape == truth.shape
    assert (merged - truth).abs().max() <= 1e-6 * truth.abs().max()
