"""Adapters of diffusion models in one naming, bases in the other: every family, however cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.errors import BaseModelError
from loratool.names.embeddings import is_embedding
from loratool.names.families import families
from loratool.names.family import Family, Fusion
from loratool.names.vocabulary import NUMBER

Tensors = dict[str, torch.Tensor]
WIDTH, RATIO, GROUPS = 12, 4, 3
BEFORE = "model.diffusion_model."
BASES = ("native.safetensors", "hub")

each_family = pytest.mark.parametrize(
    "family", [family for family in families() if family.rows], ids=lambda family: family.name
)


def modules(family: Family) -> dict[str, Fusion]:
    """Native modules of the first and the last blocks, and what they are for diffusers."""
    names = [
        row.native.replace(NUMBER, number)
        for row in family.rows
        for number in map(str, sorted({*range(row.count)[:1], *range(row.count)[-1:]}))
        if "norm" not in row.native.rpartition(".")[2] and not is_embedding(row.native)
    ]
    found = {name: family.from_native(name) for name in names}
    return {name: fusion for name, fusion in found.items() if fusion is not None}


def heights(fusion: Fusion) -> list[int]:
    others = len(fusion.modules) - 1
    if fusion.sizes == "input":
        return [*[WIDTH] * others, RATIO * WIDTH]
    if fusion.sizes == "grouped":
        return [WIDTH, *[WIDTH // GROUPS] * others]
    return [WIDTH] * (others + 1)


def hub_parts(fusion: Fusion, whole: torch.Tensor) -> Tensors:
    """What diffusers has in its modules where a native one has ``whole``."""
    if fusion.swapped:
        whole = torch.cat(whole.chunk(2)[::-1])
    return dict(zip(fusion.modules, whole.split(heights(fusion)), strict=True))


def native_whole(fusion: Fusion, parts: Tensors) -> torch.Tensor:
    """What a native module has where diffusers has ``parts``."""
    whole = torch.cat([parts[name] for name in fusion.modules])
    return torch.cat(whole.chunk(2)[::-1]) if fusion.swapped else whole


def save(folder: Path, weights: Tensors, family: Family) -> None:
    """Write the same model in both namings; ``weights`` are by native modules."""
    natives = {f"{BEFORE}{native}.weight": whole for native, whole in weights.items()}
    save_file(natives, folder / BASES[0])
    (folder / BASES[1]).mkdir()
    hubs = {}
    for native, whole in weights.items():
        fusion = family.from_native(native)
        assert fusion is not None
        for name, part in hub_parts(fusion, whole).items():
            hubs[f"{name}.weight"] = part.clone()
    save_file(hubs, folder / BASES[1] / "diffusion_pytorch_model.safetensors")


def merged(folder: Path, base: str) -> Tensors:
    """Merge the adapter into the base; return what came out by module."""
    out = folder / f"out-{base}"
    loratool.merge(folder / base, [folder / "adapter.safetensors"], out)
    file = out / "diffusion_pytorch_model.safetensors" if out.is_dir() else out
    found = load_file(file)
    return {name.removesuffix(".weight").removeprefix(BEFORE): t for name, t in found.items()}


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).norm() <= 1e-6 * expected.norm())


def check(family: Family, weights: Tensors, deltas: Tensors, folder: Path) -> None:
    """Merge into the model in both namings, and compare with the sums by native modules."""
    save(folder, weights, family)
    native, hub = (merged(folder, base) for base in BASES)
    assert set(native) == set(weights)
    for name, whole in weights.items():
        fusion = family.from_native(name)
        assert fusion is not None
        truth = whole.double() + deltas[name]
        assert near(native[name].double(), truth), name
        for module, part in hub_parts(fusion, truth).items():
            assert near(hub.pop(module).double(), part), module
    assert not hub


@each_family
def test_an_adapter_in_the_names_of_diffusers(family: Family, tmp_path: Path) -> None:
    weights: Tensors = {}
    deltas: Tensors = {}
    factors: Tensors = {}
    for native, fusion in modules(family).items():
        parts: Tensors = {}
        for hub, height in zip(fusion.modules, heights(fusion), strict=True):
            one = lora(f"{family.backbone}.{hub}", height, WIDTH)
            down, up = (factor.double() for factor in one.values())
            parts[hub] = up @ down
            factors |= one
        deltas[native] = native_whole(fusion, parts)
        weights[native] = torch.randn(deltas[native].shape)
    save_file(factors, tmp_path / "adapter.safetensors")
    check(family, weights, deltas, tmp_path)


@each_family
def test_an_adapter_in_native_names(family: Family, tmp_path: Path) -> None:
    weights: Tensors = {}
    deltas: Tensors = {}
    factors: Tensors = {}
    for native, fusion in modules(family).items():
        one = lora(f"diffusion_model.{native}", sum(heights(fusion)), WIDTH)
        down, up = (factor.double() for factor in one.values())
        factors |= one
        deltas[native] = up @ down
        weights[native] = torch.randn(deltas[native].shape)
    save_file(factors, tmp_path / "adapter.safetensors")
    check(family, weights, deltas, tmp_path)


@each_family
def test_a_conversion_from_one_naming_to_the_other_and_back(family: Family, tmp_path: Path) -> None:
    factors: Tensors = {}
    deltas: Tensors = {}
    for native, fusion in modules(family).items():
        one = lora(f"diffusion_model.{native}", sum(heights(fusion)), WIDTH)
        down, up = (factor.double() for factor in one.values())
        factors |= one
        deltas[native] = up @ down
    save_file(factors, tmp_path / "comfy.safetensors")
    loratool.convert(
        tmp_path / "comfy.safetensors",
        "diffusers",
        tmp_path / "hub.safetensors",
        family=family.name,
    )
    hub = load_file(tmp_path / "hub.safetensors")
    expected = {
        f"{family.backbone}.{name}": part
        for native, delta in deltas.items()
        for name, part in hub_parts(modules(family)[native], delta).items()
    }
    assert {key.rsplit(".", 2)[0] for key in hub} == set(expected)
    for name, delta in expected.items():
        found = hub[f"{name}.lora_B.weight"].double() @ hub[f"{name}.lora_A.weight"].double()
        assert near(found, delta), name
    loratool.convert(
        tmp_path / "hub.safetensors",
        "comfy",
        tmp_path / "back.safetensors",
        family=family.name,
    )
    back = load_file(tmp_path / "back.safetensors")
    for native, delta in deltas.items():
        key = f"diffusion_model.{native}.lora_"
        scale = back[f"diffusion_model.{native}.alpha"].double() / len(back[f"{key}down.weight"])
        found = scale * back[f"{key}up.weight"].double() @ back[f"{key}down.weight"].double()
        assert near(found, delta), native


def test_a_part_beside_the_whole_is_refused(tmp_path: Path) -> None:
    """Either of them would be added a second time."""
    module = "transformer.transformer_blocks.0.attn.to_k"
    whole = "transformer.double_blocks.0.img_attn.qkv"
    factors = lora(module, WIDTH, WIDTH) | lora(whole, 3 * WIDTH, WIDTH)
    save_file(factors, tmp_path / "adapter.safetensors")
    weights = {"double_blocks.0.img_attn.qkv.weight": torch.randn(3 * WIDTH, WIDTH)}
    save_file(weights, tmp_path / "base.safetensors")
    with pytest.raises(BaseModelError, match="means rows of"):
        loratool.merge(
            tmp_path / "base.safetensors",
            [tmp_path / "adapter.safetensors"],
            tmp_path / "out.safetensors",
        )
