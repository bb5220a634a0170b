"""The SHA-256 of the input is put where it belongs, whatever else the metadata says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from samples import lora

import loratool

ZEROS = "0" * 64
MODULE = "lora_unet_mid_block_attentions_0_proj_in"


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("key", ["ss_sd_model_hash", "modelspec.author", "anything"])
@pytest.mark.parametrize("text", [ZEROS, f"[{ZEROS}]", "0" * 200])
def test_zeros_are_kept(key: str, text: str, tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    factors = {
        f"{MODULE}.lora_down.weight": lora("x", 8, 8)["x.lora_A.weight"],
        f"{MODULE}.lora_up.weight": lora("x", 8, 8)["x.lora_B.weight"],
    }
    save_file(factors, source, metadata={key: text})
    loratool.convert(source, to="kohya", output=tmp_path / "b.safetensors", family="sdxl")
    found = metadata_of(tmp_path / "b.safetensors")
    assert found[key] == text
    history = json.loads(found["loratool"])
    assert history["inputs"][0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


def test_an_input_that_is_called_by_zeros_keeps_its_name(tmp_path: Path) -> None:
    source = tmp_path / f"{ZEROS}.safetensors"
    save_file(lora("a.b", 8, 6), source)
    loratool.convert(source, to="loralib", output=tmp_path / "b.safetensors")
    history = json.loads(metadata_of(tmp_path / "b.safetensors")["loratool"])
    assert history["inputs"][0]["name"] == source.name
    assert history["inputs"][0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
