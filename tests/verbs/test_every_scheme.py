"""Faults that are known and not mended yet: each test fails as soon as its fault is gone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import NARROW, lora

import loratool
from loratool.errors import LoratoolError, UnsupportedError
from loratool.files.containers import open_weights
from loratool.names.positions import unet_paths
from loratool.schemes import builtin_schemes, scheme_named
from loratool.schemes.opening import open_adapter

pytestmark = pytest.mark.slow

SCHEMES = [scheme.name for scheme in builtin_schemes() if scheme.is_written]
LLAMA = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4}
PLAIN = [s.name for s in builtin_schemes() if not s.paths.has_components]
"""Schemes of one model; the others are of a pipeline."""


def known(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(strict=True, reason=reason)


def shapes_for(scheme: str) -> dict[str, tuple[int, int]]:
    """Small modules that the scheme can name."""
    if scheme in NARROW:
        return {NARROW[scheme].format(block): (24, 16) for block in range(4)}
    if scheme in PLAIN:
        return {
            f"model.layers.{layer}.self_attn.{leaf}_proj": (24, 16)
            for layer in range(4)
            for leaf in "qkv"
        }
    return {
        f"unet.{path}": (64, 8) if path.endswith("ff.net.0.proj") else (8, 8)
        for path in unet_paths() or ()
    }


def place(tmp_path: Path, name: str, scheme: str) -> Path:
    found = scheme_named(scheme)
    return tmp_path / (name if found.settings.file else f"{name}{found.home.suffix}")


def weights_of(path: Path) -> Path:
    if path.is_file():
        return path
    return open_adapter(path).weights


def adapter_in(
    tmp_path: Path, scheme: str, name: str = "a", rank: int = 8, like: str | None = None
) -> Path:
    source = tmp_path / f"{name}-source.safetensors"
    factors: dict[str, torch.Tensor] = {}
    for module, (out, into) in shapes_for(like or scheme).items():
        factors |= lora(module, out, into, rank)
    save_file(factors, source)
    path = place(tmp_path, name, scheme)
    loratool.convert(source, scheme, path, base=told(tmp_path, scheme))
    return path


def told(tmp_path: Path, scheme: str) -> Path | None:
    """Return a folder with the configuration of a base, for a scheme that depends on one."""
    if scheme_named(scheme).follows is None:
        return None
    folder = tmp_path / "told"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


# The budget is counted for PEFT's file ----------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("verb", ["truncate", "compose"])
def test_the_budget_is_that_of_the_file(verb: str, scheme: str, tmp_path: Path) -> None:
    adapter = adapter_in(tmp_path, scheme)
    plain = "module-path" if scheme in PLAIN else "diffusers"
    source = adapter_in(tmp_path, plain, "b", like=scheme)
    whole = weights_of(adapter).stat().st_size
    for share in (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9):
        budget, out = int(whole * share), place(tmp_path, f"out-{share}", scheme)
        try:
            if verb == "truncate":
                loratool.truncate(adapter, out, max_size=budget)
            else:
                base = told(tmp_path, scheme)
                loratool.compose([source], out, max_size=budget, to=scheme, base=base)
        except UnsupportedError:
            assert scheme == "cloneofsimo"  # which has a place for all modules, or for none
            continue
        assert weights_of(out).stat().st_size <= budget


# The dry run of an extraction is PEFT's ---------------------------------------------------------


def models(
    make_base: Callable[..., Path], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Path, Path]:
    before = {f"{module}.weight": torch.randn(*shape) for module, shape in shapes.items()}
    after = {name: weight + torch.randn(weight.shape) for name, weight in before.items()}
    return make_base(before, LLAMA, name="base"), make_base(after, LLAMA, name="tuned")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_dry_extraction_is_the_real_one(
    scheme: str, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    shapes = {
        module if scheme in PLAIN else module.partition(".")[2]: s
        for module, s in shapes_for(scheme).items()
    }
    base, tuned = models(make_base, shapes)
    out = place(tmp_path, "out", scheme)
    dry = loratool.extract(base, tuned, out, rank=4, to=scheme, dry_run=True)
    assert not out.exists()
    loratool.extract(base, tuned, out, rank=4, to=scheme)
    real = open_weights(weights_of(out)).tensors
    told = {spec.name: (spec.dtype, spec.shape) for spec in dry.plan.specs}
    assert told == {n: (t.spec.dtype, t.spec.shape) for n, t in real.items()}
    sizes = {file["name"]: file["bytes"] for file in dry.as_json()["files"]}
    if out.is_dir():
        assert sizes == {file.name: file.stat().st_size for file in out.iterdir()}
    elif out.suffix == ".safetensors":
        assert list(sizes.values()) == [out.stat().st_size]


def test_a_dry_extraction_refuses_what_the_real_one_does(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base, tuned = models(make_base, {"conv": (8, 4, 3, 3)})
    out = tmp_path / "out.safetensors"
    with pytest.raises(LoratoolError):
        loratool.extract(base, tuned, out, rank=4, to="transposed")
    with pytest.raises(LoratoolError):
        loratool.extract(base, tuned, out, rank=4, to="transposed", dry_run=True)


# One adapter, two names of its modules ----------------------------------------------------------


@pytest.mark.parametrize("source", [name for name in SCHEMES if name not in PLAIN])
def test_compose_and_convert_name_modules_alike(source: str, tmp_path: Path) -> None:
    adapter = adapter_in(tmp_path, source)
    loratool.convert(adapter, "peft", tmp_path / "converted")
    loratool.compose([adapter], tmp_path / "composed", to="peft")
    one, other = (load_file(weights_of(tmp_path / n)) for n in ("converted", "composed"))
    assert one.keys() == other.keys()


# One base, two views ----------------------------------------------------------------------------
