"""An SDXL adapter fits a terminal: groups for its parts, names folded at their dots."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.display.terminal import plain_text

METADATA = {
    "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
    "ss_output_name": "mychar",
    "ss_steps": "1600",
    "modelspec.author": "somebody",
    "modelspec.trigger_phrase": "mychar",
    "sshs_model_hash": "ab" * 32,
}


def unet_modules() -> Iterator[str]:
    """Yield the 722 modules of SDXL's U-Net that kohya's scripts adapt."""
    blocks = {"down_blocks_1": (2, 2), "down_blocks_2": (2, 10), "mid_block": (1, 10)}
    blocks |= {"up_blocks_0": (3, 10), "up_blocks_1": (3, 2)}
    for block, (attentions, depth) in blocks.items():
        for number in range(attentions):
            place = f"{block}_attentions_{number}"
            yield from (f"{place}_proj_in", f"{place}_proj_out")
            for layer in range(depth):
                inside = f"{place}_transformer_blocks_{layer}"
                yield from (f"{inside}_ff_net_0_proj", f"{inside}_ff_net_2")
                for attention in ("attn1", "attn2"):
                    for name in ("to_k", "to_q", "to_v", "to_out_0"):
                        yield f"{inside}_{attention}_{name}"


def text_modules(layers: int) -> Iterator[str]:
    names = ("mlp_fc1", "mlp_fc2", *(f"self_attn_{name}_proj" for name in ("k", "out", "q", "v")))
    for layer in range(layers):
        yield from (f"text_model_encoder_layers_{layer}_{name}" for name in names)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = {"unet": [*unet_modules()], "te1": [*text_modules(12)], "te2": [*text_modules(32)]}
    assert [len(names) for names in parts.values()] == [722, 72, 192]
    tensors = {}
    for part, names in parts.items():
        for name in names:
            tensors[f"lora_{part}_{name}.lora_down.weight"] = torch.zeros(2, 4)
            tensors[f"lora_{part}_{name}.lora_up.weight"] = torch.zeros(4, 2)
            tensors[f"lora_{part}_{name}.alpha"] = torch.tensor(1.0)
    path = tmp_path_factory.mktemp("sdxl") / "sdxl.safetensors"
    save_file(tensors, path, metadata=METADATA)
    return path


@pytest.mark.parametrize(("width", "most"), [(80, 45), (60, 60)])
def test_inspect_fits(sdxl: Path, width: int, most: int) -> None:
    lines = plain_text(loratool.inspect(sdxl).document(), width).split("\n")
    assert len(lines) < most
    assert max(map(len, lines)) <= width
    for part in ("unet down", "unet mid", "unet up", "te1", "te2"):
        assert any(line.startswith(part) for line in lines)
    for line, following in pairwise(lines):
        if following.startswith("    "):  # the rest of a name
            assert re.search(r"[._,/]$", line), line
    assert "in all: kind linear; rank 2; alpha 1; scale 0.5" in " ".join(lines)


def test_in_a_pipe_nothing_is_folded(sdxl: Path) -> None:
    text = str(loratool.inspect(sdxl))
    assert not re.search(r"^\s*\n|\s$|[ \t]\n", text)
    assert "{0,1}.attentions.{0..2}.transformer_blocks.{0,1}.{attn1,attn2}.to_{k,q,v,out.0}" in text


@pytest.mark.parametrize("width", [60, 80])
def test_other_reports_fit(sdxl: Path, width: int, tmp_path: Path) -> None:
    report = loratool.truncate(sdxl, tmp_path / "out.safetensors", rank=1, dry_run=True)
    lines = plain_text(report.document(), width).split("\n")
    assert len(lines) < 60
    assert max(map(len, lines)) <= width


def test_every_module_has_a_row_when_asked(sdxl: Path) -> None:
    info = loratool.inspect(sdxl)
    assert isinstance(info, loratool.AdapterInfo)
    text = plain_text(info.document(unfolded=True))
    assert text.count("text_encoder_2.text_model.encoder.layers.") == 192


def test_spectra_fit(sdxl: Path, tmp_path: Path) -> None:
    tensors = {
        key: torch.randn(value.shape) if value.ndim else value
        for key, value in load_file(sdxl).items()
    }
    path = tmp_path / "trained.safetensors"
    save_file(tensors, path, metadata=METADATA)
    info = loratool.inspect(path, spectrum=True)
    assert isinstance(info, loratool.AdapterInfo)
    lines = plain_text(info.document(), 80).split("\n")
    assert len(lines) < 90
    assert max(map(len, lines)) <= 80
    told = " ".join(lines)
    assert "attn1.to_{k,q,v,out.0}" in told and "unet attn1.to_out.0" in told
    assert "down_blocks" in told and "{1,2}.attentions" not in told
    assert "{1,2}.attentions" in plain_text(info.document(names_all=True))
    rows = plain_text(info.document(unfolded=True)).split("\n")
    assert sum("text_encoder_2.text_model" in line for line in rows) == 2 * 192
    assert any(re.search("σ₁.*99.9 %", line) for line in rows)


@pytest.mark.parametrize("form", ["lora_{}_x", "{}.a.q", "a.{}.q", "model.{}.q"])
def test_names_that_do_not_fold_do_not_flood(form: str, tmp_path: Path) -> None:
    words = [f"{chr(97 + n % 26)}{n * 7919 % 10007}" * (1 + n % 3) for n in range(400)]
    names = [form.format(word if n % 2 else f"{word}.{word}") for n, word in enumerate(words)]
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_A.weight"] = torch.zeros(1, 2)
        tensors[f"{name}.lora_B.weight"] = torch.zeros(2, 1)
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path)
    info = loratool.inspect(path)
    assert len(str(info)) < 8000
    assert len(plain_text(info.document(), 80).split("\n")) < 150
    assert isinstance(info, loratool.AdapterInfo)
    assert len(plain_text(info.document(unfolded=True)).split("\n")) >= 400
    for report in (loratool.compare([path, path]), loratool.inspect(path, spectrum=True)):
        assert len(str(report).split("\n")) < 350
    assert "others" in str(loratool.compare([path, path]))
