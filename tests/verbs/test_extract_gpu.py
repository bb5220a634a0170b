"""``extract`` on a GPU, which here is a fake one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deltas import load_tensors
from fake_gpu import fake_gpu

import loratool
from loratool.verbs.extraction.gpu import MOST_WAITS

pytestmark = pytest.mark.slow
SHAPES = {"a.q_proj": (700, 900), "b.up_proj": (900, 640), "c.k_proj": (300, 400)}


@pytest.fixture
def pair(make_base: Any) -> tuple[Path, Path]:
    return make_pair(make_base, torch.bfloat16, torch.bfloat16)


def make_pair(make_base: Any, before: torch.dtype, after: torch.dtype) -> tuple[Path, Path]:
    base, tuned = {}, {}
    for name, (m, n) in SHAPES.items():
        weight = (torch.randn(m, n) * 0.02).to(before)
        change = torch.randn(m, 9) @ torch.randn(9, n) * 1e-3 + 1e-4 * torch.randn(m, n)
        base[f"{name}.weight"] = weight
        tuned[f"{name}.weight"] = (weight.float() + change).to(after)
    return make_base(base, name="base"), make_base(tuned, name="tuned")


def deltas(path: Path) -> dict[str, torch.Tensor]:
    tensors = load_tensors(path)
    return {
        name: (tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double())
        for name in tensors
        if "lora_A" in name
    }


def agree(one: Path, other: Path, tolerance: float) -> None:
    first, second = deltas(one), deltas(other)
    assert first.keys() == second.keys()
    for name, delta in first.items():
        assert float((delta - second[name]).norm()) < tolerance * float(delta.norm())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
)
def test_a_gpu_finds_what_the_processor_finds(
    make_base: Any, tmp_path: Path, monkeypatch: Any, before: torch.dtype, after: torch.dtype
) -> None:
    base, tuned = make_pair(make_base, before, after)
    options: dict[str, Any] = {"rank": 9, "method": "randomised", "dtype": "float32"}
    here = loratool.extract(base, tuned, tmp_path / "here", **options)
    with fake_gpu(monkeypatch) as gpu:
        there = loratool.extract(base, tuned, tmp_path / "there", device="cuda", **options)
    assert gpu.kernels and there.device == "cuda:0 (fake)" and here.device == "cpu"
    agree(tmp_path / "here", tmp_path / "there", 1e-5)
    for one, other in zip(here.modules, there.modules, strict=True):
        assert one.squared_norm == pytest.approx(other.squared_norm, rel=1e-5)
        assert one.squared_error == pytest.approx(other.squared_error, rel=1e-3)
        assert one.floor == pytest.approx(other.floor, rel=1e-5)


def test_a_module_waits_a_few_times_only(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    with fake_gpu(monkeypatch) as gpu:
        loratool.extract(*pair, tmp_path / "out", rank=9, method="randomised", device="cuda")
    assert 0 < gpu.waits <= MOST_WAITS * len(SHAPES)
    assert gpu.uploads and not gpu.bad_uploads
    assert gpu.flags == {False}
