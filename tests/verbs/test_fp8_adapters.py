"""Adapters in floats of 8 bits: read by every verb, and nothing that is computed goes back to 8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import ALPHA, DTYPES, RANK, UNET, Draw, exact, sample
from safetensors.torch import load_file, save_file

import loratool

DELTA = np.ndarray
EIGHT = ("F8_E4M3", "F8_E5M2")
BASE = "mid_block.attentions.0.proj_in.weight"
ROUNDED = 2.0**-8
"""Of bfloat16, in which results are written."""


@pytest.fixture(params=EIGHT)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write(dtype: str, folder: Path, name: str = "adapter", seed: str = "") -> tuple[Path, DELTA]:
    """Write kohya's factors, and its alpha in 8 bits too; return their delta in float64."""
    draw = Draw(f"fp8 {seed}", dtype)
    down, up = draw(RANK, 32), draw(32, RANK, size=0.3)
    alpha = torch.tensor(ALPHA).to(DTYPES[dtype])
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}
    path = folder / f"{name}.safetensors"
    save_file({f"{UNET}.{key}": value for key, value in tensors.items()}, path)
    return path, ALPHA / RANK * exact(up) @ exact(down)


def delta_of(path: Path, factor: float = 1.0) -> DELTA:
    tensors = load_file(path)
    assert not {value.dtype for value in tensors.values()} & {DTYPES[name] for name in EIGHT}
    found = {key.partition(".")[2]: value for key, value in tensors.items()}
    down, up = found["lora_down.weight"], found["lora_up.weight"]
    return float(found["alpha"]) / len(down) * exact(up) @ exact(down)


def assert_near(found: DELTA, wanted: DELTA, tolerance: float = ROUNDED) -> None:
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


def test_inspect_and_validate(dtype: str, tmp_path: Path) -> None:
    path, _ = write(dtype, tmp_path)
    (module,) = loratool.inspect(path, spectrum=True).as_json()["modules"]
    assert (module["dtype"], module["scale"]) == (dtype, ALPHA / RANK)
    assert not [f for f in loratool.validate(path, deep=True) if f.is_error]


def test_a_nan_is_found(dtype: str, tmp_path: Path) -> None:
    path, _ = write(dtype, tmp_path)
    tensors = load_file(path)
    tensors[f"{UNET}.lora_up.weight"].view(torch.uint8)[0, 0] = 0x7F
    save_file(tensors, path)
    assert "LT017" in [finding.code for finding in loratool.validate(path, deep=True)]


@pytest.mark.parametrize("variant", ["kohya", "loha", "lokr", "lora", "dora", "full", "diff-b"])
def test_merge(variant: str, dtype: str, tmp_path: Path) -> None:
    made = sample(variant, dtype)
    if not made.base:
        (delta,) = made.deltas.values()
        weight = torch.randn(delta.shape)
        truth = {BASE: exact(weight) + delta}
        (tmp_path / "base").mkdir()
        save_file({BASE: weight}, tmp_path / "base" / "model.safetensors")
        base = tmp_path / "base"
    else:
        base = made.write_base(tmp_path)
        truth = {name: change.value for name, change in made.merged.items()}
    loratool.merge(base, [made.write(tmp_path)], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in truth.items():
        assert_near(exact(merged[name]), value, 1e-6)


def test_what_only_moves_stays_as_it_is(dtype: str, tmp_path: Path) -> None:
    path, _ = write(dtype, tmp_path)
    loratool.convert(path, "comfy", tmp_path / "out.safetensors")
    before, after = load_file(path), load_file(tmp_path / "out.safetensors")
    assert torch.equal(
        before[f"{UNET}.lora_up.weight"].view(torch.uint8),
        next(v for k, v in after.items() if "lora_up" in k).view(torch.uint8),
    )


def test_a_folded_scale_is_not_rounded_to_eight_bits(dtype: str, tmp_path: Path) -> None:
    path, delta = write(dtype, tmp_path)
    loratool.convert(path, "diffusers", tmp_path / "out.safetensors")
    found = {
        key.rpartition("lora_")[2]: v for key, v in load_file(tmp_path / "out.safetensors").items()
    }
    assert found["B.weight"].dtype is torch.bfloat16
    assert_near(exact(found["B.weight"]) @ exact(found["A.weight"]), delta)


def test_written_out_factors(dtype: str, tmp_path: Path) -> None:
    made = sample("loha", dtype)
    loratool.convert(made.write(tmp_path), "kohya", tmp_path / "out.safetensors", to_lora=True)
    (delta,) = made.deltas.values()
    assert_near(delta_of(tmp_path / "out.safetensors"), delta)


def test_algebra(dtype: str, tmp_path: Path) -> None:
    (one, first), (two, second) = (write(dtype, tmp_path, name, name) for name in ("a", "b"))
    out = tmp_path / "sum.safetensors"
    loratool.compose([one, two], out, weights=[0.5, -2.0])
    assert_near(delta_of(out), 0.5 * first - 2.0 * second)
    loratool.truncate(one, tmp_path / "short.safetensors", rank=2)
    U, S, Vh = np.linalg.svd(first)
    assert_near(delta_of(tmp_path / "short.safetensors"), (U[:, :2] * S[:2]) @ Vh[:2])
    loratool.rescale(one, tmp_path / "folded.safetensors", fold=True)
    assert_near(delta_of(tmp_path / "folded.safetensors"), first)
    loratool.rescale(one, tmp_path / "half.safetensors", scale=0.3)
    assert load_file(tmp_path / "half.safetensors")[f"{UNET}.lora_up.weight"].dtype is DTYPES[dtype]
    found = loratool.compare([one, two]).as_json()
    cosine = float((first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second))
    assert found["cosine"] == pytest.approx(cosine, abs=1e-9)
