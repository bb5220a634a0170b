"""Flattened names that two families have are told by the others beside them."""

from __future__ import annotations

import pytest

from loratool.names.paths.flat import from_bare_flat, from_flat

QKV = "double_blocks_0_img_attn_qkv"
FLUX, HUNYUAN = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn_qkv"
CASES = [
    ("double_blocks_0_txt_mlp_0", FLUX, None),  # Flux.1 or 2, which call it alike
    ("single_blocks_37_linear1", FLUX, "flux"),
    ("double_blocks_0_txt_mlp_fc1", HUNYUAN, None),  # 1.0 or 1.5, which call it alike
    ("single_blocks_39_linear1", HUNYUAN, "hunyuan-video"),
    ("double_blocks_53_txt_attn_proj", HUNYUAN, "hunyuan-video-1.5"),
    ("double_blocks_0_txt_attn_v", HUNYUAN, "hunyuan-video-1.5"),
]


@pytest.mark.parametrize(("beside", "path", "family"), CASES)
def test_behind_a_prefix(beside: str, path: str, family: str | None) -> None:
    names = from_flat([f"lora_unet_{QKV}", f"lora_unet_{beside}"], {}, ())
    assert names.paths[f"lora_unet_{QKV}"] == (f"transformer.{path}",)
    assert names.family == family
    assert names.is_native


@pytest.mark.parametrize(("beside", "path", "family"), CASES)
def test_without_one(beside: str, path: str, family: str | None) -> None:
    assert from_bare_flat([QKV, beside], {}, ()).paths[QKV] == (path,)
