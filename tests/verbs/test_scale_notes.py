"""What is said where nothing records a scale: by every verb, and never of loratool's own files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from samples import lora

import loratool
from loratool.schemes.opening import open_adapter

MODULE = "model.layers.0.self_attn.q_proj"
FOLDED = ("loralib", "module-path", "transposed")
"""Schemes of dotted paths that have no place for a scale."""


@pytest.fixture
def base(make_base: Callable[..., Path]) -> Path:
    return make_base({f"{MODULE}.weight": torch.randn(12, 10)}, {"model_type": "llama"})


def said_by(verb: str, base: Path, adapter: Path, out: Path) -> Sequence[str]:
    """Everything that a verb says about an adapter."""
    match verb:
        case "merge":
            return loratool.merge(base, [adapter], out).notes
        case "compare":
            return loratool.compare([adapter, adapter]).notes
        case "compose":
            return loratool.compose([adapter, adapter], output=out, dry_run=True).notes
        case "truncate":
            return loratool.truncate(adapter, rank=2, output=out, dry_run=True).notes
        case "convert":
            return loratool.convert(adapter, to="peft", output=out, dry_run=True).notes
        case "validate":
            return [found.message for found in loratool.validate(adapter)]
    raise AssertionError(verb)


def about_scale(notes: Sequence[str]) -> Iterator[str]:
    return (note for note in notes if "scale is taken as 1" in note or "alpha is recorded" in note)


VERBS = ("merge", "compare", "compose", "truncate", "convert", "validate")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("scheme", FOLDED)
def test_folded_files_of_loratool_are_no_riddle(
    verb: str, scheme: str, base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_adapter(lora(MODULE, 12, 10), target_modules=["q_proj"])
    folded = tmp_path / "folded.safetensors"
    loratool.convert(source, to=scheme, output=folded)
    assert open_adapter(folded).sites[0].scaling.alpha is None
    assert not list(about_scale(said_by(verb, base, folded, tmp_path / "out")))


@pytest.mark.parametrize("verb", VERBS)
def test_files_of_others_are(verb: str, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    save_file(lora(MODULE, 12, 10), path)
    (note,) = set(about_scale(said_by(verb, base, path, tmp_path / "out")))
    assert "alpha is not recorded, so the scale is taken as 1" in note


def with_alpha(verb: str, base: Path, adapter: Path, out: Path, alpha: float) -> Sequence[str]:
    """Everything that a verb says about an adapter that it is told an alpha for."""
    match verb:
        case "merge":
            return loratool.merge(base, [adapter], out, alpha=alpha, force=True).notes
        case "compare":
            return loratool.compare([adapter, adapter], alpha=alpha).notes
        case "compose":
            return loratool.compose([adapter, adapter], out, alpha=alpha, dry_run=True).notes
        case "truncate":
            return loratool.truncate(adapter, out, rank=2, alpha=alpha, dry_run=True).notes
        case "convert":
            return loratool.convert(adapter, "kohya", out, alpha=alpha, dry_run=True).notes
    raise AssertionError(verb)


@pytest.mark.parametrize("verb", ["merge", "compare", "compose", "truncate", "convert"])
def test_an_alpha_without_effect_is_told(
    verb: str, base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(lora(MODULE, 12, 10), target_modules=["q_proj"], lora_alpha=16)
    out = tmp_path / ("out.safetensors" if verb == "convert" else "out")
    told = [n for n in with_alpha(verb, base, adapter, out, 5) if "--alpha 5 has no effect" in n]
    assert told
    assert not any("--alpha" in n for n in with_alpha(verb, base, adapter, out, 16))


def test_an_alpha_that_only_some_modules_lack(tmp_path: Path) -> None:
    pairs = {f"{MODULE[:-6]}{leaf}": lora("x", 8, 6) for leaf in ("q_proj", "k_proj")}
    tensors = {
        f"{name}.lora_{side}.weight": factors[f"x.lora_{letter}.weight"]
        for name, factors in pairs.items()
        for side, letter in (("down", "A"), ("up", "B"))
    }
    tensors[f"{MODULE}.alpha"] = torch.tensor(2.0)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    (note,) = [n for n in open_adapter(path, alpha=5).notes if "--alpha" in n]
    assert "has no effect in 1 of 2 modules" in note
