"""Adapters of diffusion models in one naming, bases in the other: every family, fused or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.names.families import families
from loratool.names.family import Family
from loratool.names.vocabulary import NUMBER

Tensors = dict[str, torch.Tensor]
WIDTH, RATIO = 8, 4
BEFORE = "model.diffusion_model."

each_family = pytest.mark.parametrize(
    "family", [family for family in families() if family.rows], ids=lambda family: family.name
)


def modules(family: Family) -> dict[str, tuple[str, ...]]:
    """Native modules of the first and the last blocks, and what they are for diffusers."""
    return {
        row.native.replace(NUMBER, number): tuple(
            name.replace(NUMBER, number) for name in row.hub.modules
        )
        for row in family.rows
        for number in map(str, sorted({*range(row.count)[:1], *range(row.count)[-1:]}))
        if not row.hub.swapped and "norm" not in row.native
    }


def heights(family: Family, native: str) -> list[int]:
    fusion = family.from_native(native)
    assert fusion is not None
    rows = [WIDTH] * len(fusion.modules)
    return [*rows[:-1], RATIO * WIDTH] if fusion.sizes == "input" else rows


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).norm() <= 1e-6 * expected.norm())


@each_family
def test_diffusers_names_into_a_native_base(family: Family, tmp_path: Path) -> None:
    weights: Tensors = {}
    truth, factors = {}, {}
    for native, hubs in modules(family).items():
        rows = heights(family, native)
        weights[f"{BEFORE}{native}.weight"] = torch.randn(sum(rows), WIDTH)
        deltas = []
        for hub, height in zip(hubs, rows, strict=True):
            one = lora(f"{family.backbone}.{hub}", height, WIDTH)
            down, up = (factor.double() for factor in one.values())
            deltas.append(up @ down)
            factors |= one
        name = f"{BEFORE}{native}.weight"
        truth[name] = weights[name].double() + torch.cat(deltas)
    save_file(weights, tmp_path / "base.safetensors")
    save_file(factors, tmp_path / "adapter.safetensors")
    loratool.merge(
        tmp_path / "base.safetensors",
        [tmp_path / "adapter.safetensors"],
        tmp_path / "o.safetensors",
    )
    merged = load_file(tmp_path / "o.safetensors")
    assert set(merged) == set(truth)
    for name, value in merged.items():
        assert near(value.double(), truth[name]), name


@each_family
def test_native_names_into_a_base_of_diffusers(family: Family, tmp_path: Path) -> None:
    weights: Tensors = {}
    truth, factors = {}, {}
    for native, hubs in modules(family).items():
        rows = heights(family, native)
        one = lora(f"diffusion_model.{native}", sum(rows), WIDTH)
        down, up = (factor.double() for factor in one.values())
        factors |= one
        for hub, delta in zip(hubs, (up @ down).split(rows), strict=True):
            weights[f"{hub}.weight"] = torch.randn(delta.shape)
            truth[f"{hub}.weight"] = weights[f"{hub}.weight"].double() + delta
    (tmp_path / "base").mkdir()
    name = "diffusion_pytorch_model.safetensors"
    save_file(weights, tmp_path / "base" / name)
    save_file(factors, tmp_path / "adapter.safetensors")
    loratool.merge(tmp_path / "base", [tmp_path / "adapter.safetensors"], tmp_path / "out")
    merged = load_file(tmp_path / "out" / name)
    assert set(merged) == set(truth)
    for name, value in merged.items():
        assert near(value.double(), truth[name]), name
