"""XLabs' files of Flux, as diffusers itself reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from safetensors.torch import load_file, save_file

import loratool

WIDTH = 8


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_it_is_what_diffusers_reads(prefix: str, tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}

    def put(name: str, out: int, into: int) -> None:
        tensors[f"{prefix}{name}.down.weight"] = torch.randn(4, into)
        tensors[f"{prefix}{name}.up.weight"] = torch.randn(out, 4)

    for block in range(2):
        for number in (1, 2):
            put(f"double_blocks.{block}.processor.qkv_lora{number}", 3 * WIDTH, WIDTH)
            put(f"double_blocks.{block}.processor.proj_lora{number}", WIDTH, WIDTH)
        put(f"single_blocks.{block}.processor.qkv_lora", 3 * WIDTH, WIDTH)
        put(f"single_blocks.{block}.processor.proj_lora", WIDTH, 5 * WIDTH)
    save_file(tensors, tmp_path / "x.safetensors")
    assert loratool.open_adapter(tmp_path / "x.safetensors").scheme == "xlabs"
    loratool.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "d.safetensors")
    wanted = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    made = load_file(tmp_path / "d.safetensors")
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[key], wanted[key]) for key in made)
    loratool.convert(tmp_path / "x.safetensors", "kohya", tmp_path / "k.safetensors")
    keys = load_file(tmp_path / "k.safetensors")
    assert any("double_blocks_0_img_attn_qkv" in key for key in keys)
