"""Pipelines in FP8, in one file as ComfyUI has them or in folders: merged, validated, kept."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_files import PIPELINES, Pipeline, State

import loratool

pytestmark = pytest.mark.slow
pytest.importorskip("diffusers")

FP8 = torch.float8_e4m3fn
KINDS = ("plain", "old", "tensor", "metadata")
METADATA = "_quantization_metadata"
MARKERS = ("scaled_fp8", "scale_weight", "scale_input", "comfy_quant", "weight_scale")


@cache
def pipeline(name: str) -> Pipeline:
    torch.manual_seed(5)
    return PIPELINES[name]()


@cache
def trained(name: str) -> tuple[State, State]:
    """Return an adapter of all linear layers in diffusers' names, and what it adds to the file."""
    factors: State = {}
    one = pipeline(name)
    states, deltas = one.states(), one.states()
    torch.manual_seed(6)
    for component, model in one.models.items():
        deltas[component] = {k: torch.zeros_like(v) for k, v in states[component].items()}
        for path, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d) or "lm_head" in path:
                continue
            out, into = module.weight.shape[0], module.weight[0].numel()
            down = torch.randn(3, *module.weight.shape[1:])
            up = torch.randn(out, 3, *([1, 1] if module.weight.ndim == 4 else []))
            factors[f"{component}.{path}.lora_A.weight"] = down
            factors[f"{component}.{path}.lora_B.weight"] = up
            delta = up.flatten(1).double() @ down.reshape(3, into).double()
            deltas[component][f"{path}.weight"] = delta.view(module.weight.shape).float()
    return factors, one.file(deltas)


def is_scaled(name: str, value: torch.Tensor, prefixes: tuple[str, ...]) -> bool:
    return name.endswith(".weight") and name.startswith(prefixes) and value.ndim in (2, 4)


def quantised(name: str, kind: str) -> tuple[State, State, dict[str, str]]:
    """Return what a file stores, what its weights are, and its metadata."""
    one = pipeline(name)
    plain = one.file(one.states())
    if kind == "plain":
        stored = {key: value.to(FP8) for key, value in plain.items()}
        return stored, {key: value.double() for key, value in stored.items()}, {}
    backbone = next(p for c, p in one.prefixes.items() if c in ("unet", "transformer"))
    t5 = tuple(p for p in one.prefixes.values() if "t5xxl" in p)
    prefixes = (backbone, *t5) if kind == "old" else (backbone,)
    stored, truth = {}, {}
    layers = {}
    for key, value in plain.items():
        if not is_scaled(key, value, prefixes):
            stored[key], truth[key] = value.half(), value.half().double()
            continue
        module = key.removesuffix(".weight")
        scale = value.abs().max() / 448
        stored[key] = (value / scale).to(FP8)
        truth[key] = stored[key].double() * scale.double()
        leaf = "scale_weight" if kind == "old" else "weight_scale"
        stored[f"{module}.{leaf}"] = scale
        stored[f"{module}.{'scale_input' if kind == 'old' else 'input_scale'}"] = torch.ones(())
        if kind == "tensor":
            mark = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{module}.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
        layers[module.removeprefix(backbone)] = {"format": "float8_e4m3fn"}
    if kind == "old":
        stored |= {f"{prefix}scaled_fp8": torch.empty(0, dtype=FP8) for prefix in prefixes}
    told = {METADATA: json.dumps({"format_version": "1.0", "layers": layers})}
    return stored, truth, told if kind == "metadata" else {}


@pytest.fixture(params=["flux", "sdxl", "sd1", "flux-alone"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["diffusers", "kohya"])
def adapter(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "adapter.safetensors"
    save_file(trained(name)[0], path)
    if request.param == "diffusers":
        return path
    loratool.convert(path, to=request.param, output=tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def test_a_file_is_merged_into_plain_numbers(
    name: str, kind: str, adapter: Path, tmp_path: Path
) -> None:
    stored, truth, metadata = quantised(name, kind)
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(stored, base, metadata=metadata or None)
    found = loratool.validate(adapter, base=base)
    assert not [finding for finding in found if finding.code.startswith("LT02")]
    report = loratool.merge(base, [adapter], out)
    assert not report.unused
    merged, deltas = load_file(out), trained(name)[1]
    assert set(merged) == set(truth)
    for key, value in truth.items():
        wanted = value + deltas[key].double()
        is_coded = stored[key].dtype == FP8
        assert merged[key].dtype == (torch.bfloat16 if is_coded else torch.float16), key
        bound = 2.0**-8 * wanted.abs() + 1e-5 * wanted.abs().max()
        assert ((merged[key].double() - wanted).abs() <= bound).all(), key
    with safe_open(out, "pt") as file:
        assert METADATA not in (file.metadata() or {})
    assert not [key for key in merged if key.endswith(MARKERS)]
    assert not loratool.verify(out, base=base, adapters=[adapter])


@pytest.mark.parametrize("adapter", ["diffusers"], indirect=True)
@pytest.mark.parametrize("name", ["flux", "sdxl"], indirect=True)
def test_a_file_is_kept_in_its_format(name: str, kind: str, adapter: Path, tmp_path: Path) -> None:
    stored, truth, metadata = quantised(name, kind)
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(stored, base, metadata=metadata or None)
    loratool.merge(base, [adapter], out, quantized="keep")
    merged, deltas = load_file(out), trained(name)[1]
    assert set(merged) == set(stored)
    for key, value in truth.items():
        wanted, found = value + deltas[key].double(), merged[key].double()
        assert merged[key].dtype == stored[key].dtype
        module = key.removesuffix(".weight")
        for leaf in ("scale_weight", "weight_scale"):
            found = found * merged.get(f"{module}.{leaf}", torch.ones(())).double()
        if deltas[key].any():
            assert (found - wanted).norm() <= 0.05 * wanted.norm(), key
        else:
            assert torch.equal(merged[key].double(), stored[key].double()), key
    with safe_open(base, "pt") as before, safe_open(out, "pt") as after:
        told = [(file.metadata() or {}).get(METADATA) for file in (before, after)]
        assert told[0] == told[1]


@pytest.mark.parametrize("name", ["sdxl"], indirect=True)
@pytest.mark.parametrize("adapter", ["diffusers"], indirect=True)
def test_a_pipeline_in_folders_is_merged(name: str, adapter: Path, tmp_path: Path) -> None:
    """Its U-Net in FP8 that is cast, its text encoders in float32."""
    folder, out = tmp_path / "pipeline", tmp_path / "out"
    one = pipeline(name)
    for component, model in one.models.items():
        model.save_pretrained(folder / component)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = {key: value.to(FP8) for key, value in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    loratool.merge(folder, [adapter], out)
    assert not loratool.verify(out, base=folder, adapters=[adapter])
    factors = trained(name)[0]
    model = type(one.models["unet"]).from_pretrained(out / "unet", torch_dtype=torch.bfloat16)
    for key, value in model.state_dict().items():
        wanted = state[key].double()
        path = f"unet.{key.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" in factors and key.endswith(".weight"):
            down, up = (factors[f"{path}.lora_{x}.weight"].double().flatten(1) for x in "AB")
            wanted = wanted + (up @ down).view(wanted.shape)
        bound = 2.0**-8 * wanted.abs() + 1e-5 * wanted.abs().max()
        assert ((value.double() - wanted).abs() <= bound).all(), key
