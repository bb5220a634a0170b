"""``init_lora_weights``: one value means the same wherever it is said and whatever is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from samples import lora

import loratool
from loratool.adapter.initialisations import BaseEffect, initialisation
from loratool.errors import LoratoolError, UnsupportedError
from loratool.verbs.validate import validate

MODULE = "model.layers.0.self_attn.q_proj"
UNET = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
HARMLESS = (True, False, 1, 0, None, "gaussian", "orthogonal", "eva", "mica", "Gaussian")
COMPUTABLE = ("pissa", "olora", "PiSSA")
UNDETERMINED = ("pissa_niter_4", "corda", "lora_ga", "loftq")
UNKNOWN = ("brand_new", "pissa2", "gaussian_mixture", "")


def from_config(init: object, make_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    return make_adapter(lora(MODULE, 12, 10), target_modules=["q_proj"], init_lora_weights=init)


def from_metadata(init: object, make_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    fields = {"unet.r": 4, "unet.lora_alpha": 8, "unet.init_lora_weights": init}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(lora(UNET, 8, 8), path, metadata={"lora_adapter_metadata": json.dumps(fields)})
    return path


def from_metadata_with_alphas(
    init: object, make_adapter: Callable[..., Path], tmp_path: Path
) -> Path:
    fields = {"unet.init_lora_weights": init}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(
        {**lora(UNET, 8, 8), f"{UNET}.alpha": torch.tensor(4.0)},
        path,
        metadata={"lora_adapter_metadata": json.dumps(fields)},
    )
    return path


SOURCES = (from_config, from_metadata, from_metadata_with_alphas)
VERBS: dict[str, Callable[[Path, Path], object]] = {
    "compose": lambda path, out: loratool.compose([path, path], output=out, dry_run=True),
    "truncate": lambda path, out: loratool.truncate(path, rank=2, output=out, dry_run=True),
    "convert": lambda path, out: loratool.convert(path, to="peft", output=out, dry_run=True),
    "rescale": lambda path, out: loratool.rescale(path, scale=2, output=out, dry_run=True),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("init", [*COMPUTABLE, *UNDETERMINED, *UNKNOWN])
def test_verbs_without_a_base_refuse_what_may_have_changed_it(
    init: object,
    source: Callable[..., Path],
    verb: str,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    path = source(init, make_adapter, tmp_path)
    with pytest.raises(UnsupportedError, match="init_lora_weights is"):
        VERBS[verb](path, tmp_path / "out")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("init", HARMLESS)
def test_and_take_what_did_not(
    init: object,
    source: Callable[..., Path],
    verb: str,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    VERBS[verb](source(init, make_adapter, tmp_path), tmp_path / "out")


@pytest.mark.parametrize("init", [*HARMLESS, *COMPUTABLE, *UNDETERMINED, *UNKNOWN])
def test_a_merge_takes_what_the_base_determines(
    init: object,
    make_adapter: Callable[..., Path],
    make_base: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = make_base({f"{MODULE}.weight": torch.randn(12, 10)}, {"model_type": "llama"})
    adapter = from_config(init, make_adapter, tmp_path)
    if init in (*HARMLESS, *COMPUTABLE):
        loratool.merge(base, [adapter], tmp_path / "out")
    else:
        with pytest.raises(LoratoolError, match="init_lora_weights is"):
            loratool.merge(base, [adapter], tmp_path / "out")


@pytest.mark.parametrize("init", [*HARMLESS, *COMPUTABLE, *UNDETERMINED, *UNKNOWN])
def test_compare_says_that_only_the_factors_are_compared(
    init: object, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    path = from_config(init, make_adapter, tmp_path)
    notes = [note for note in loratool.compare([path, path]).notes if "init_lora_weights" in note]
    assert bool(notes) == (init not in HARMLESS)


@pytest.mark.parametrize("init", [*HARMLESS, *COMPUTABLE, *UNDETERMINED, *UNKNOWN])
def test_loaders_are_warned_of_every_base_that_may_have_changed(
    init: object, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = from_config(init, make_adapter, tmp_path)
    says = [f for f in validate(adapter, target="vllm") if "init_lora_weights" in f.message]
    assert bool([f for f in says if f.code.startswith("LT2")]) == (init not in HARMLESS)


def test_the_table_is_asked_by_whole_names() -> None:
    assert initialisation("pissa").effect is BaseEffect.COMPUTABLE
    assert initialisation("pissa_niter_16").effect is BaseEffect.UNDETERMINED
    assert initialisation("pissa_other").effect is BaseEffect.UNKNOWN
