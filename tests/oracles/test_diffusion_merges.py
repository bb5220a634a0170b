"""A merge in native names against diffusers: its converter, its LoRA layers and their fusing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.names.families import family_named

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]

Z_IMAGE: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "in_channels": 4,
    "axes_dims": [4, 6, 6],
    "axes_lens": [16, 16, 16],
}
AURAFLOW: dict[str, Any] = {
    "sample_size": 8,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 16,
    "caption_projection_dim": 32,
    "pos_embed_max_size": 16,
}


@pytest.mark.parametrize(
    ("name", "model", "options", "converter"),
    [
        ("z-image", "ZImageTransformer2DModel", Z_IMAGE, "convert_z_image_transformer"),
        ("auraflow", "AuraFlowTransformer2DModel", AURAFLOW, "convert_auraflow_transformer"),
    ],
)
def test_a_merge_is_what_diffusers_computes(
    name: str, model: str, options: dict[str, Any], converter: str, tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    to_hub: Callable[[Tensors], Tensors] = getattr(utils, f"{converter}_checkpoint_to_diffusers")
    family = family_named(name)
    real = getattr(diffusers, model)(**options)
    hub = {
        key.rpartition(".")[0]: layer
        for key, layer in real.state_dict().items()
        if key.endswith(".weight")
    }
    native: Tensors = {}
    factors: Tensors = {}
    beside = {k: v for k, v in real.state_dict().items() if not k.endswith(".weight")}
    for module in hub:
        whole, fusion = family.to_native(module) or pytest.fail(module)
        if f"{whole}.weight" in native:
            continue
        rows = sum(len(hub[part]) for part in fusion.modules)
        native[f"{whole}.weight"] = torch.randn(rows, *hub[module].shape[1:])
        if hub[module].ndim == 2:
            factors |= lora(f"diffusion_model.{whole}", rows, hub[module].shape[1])
        for part in fusion.modules:
            bias = beside.pop(f"{part}.bias", None)
            if bias is not None:
                native[f"{whole}.bias"] = torch.randn(rows)
    names = {"pos_embed.pos_embed": "positional_encoding"}
    native |= {names.get(key, key): value for key, value in beside.items()}
    save_file(native, tmp_path / "base.safetensors")
    save_file(factors, tmp_path / "adapter.safetensors")
    loratool.merge(
        tmp_path / "base.safetensors",
        [tmp_path / "adapter.safetensors"],
        tmp_path / "m.safetensors",
    )
    loratool.convert(tmp_path / "adapter.safetensors", "diffusers", tmp_path / "h.safetensors")

    real.load_state_dict(to_hub(dict(native)))
    state = load_file(tmp_path / "h.safetensors")
    real.load_lora_adapter(state, prefix="transformer")
    assert len({key.rsplit(".", 2)[0] for key in state}) == sum(w.ndim == 2 for w in hub.values())
    real.fuse_lora()
    real.unload_lora()
    expected = to_hub(load_file(tmp_path / "m.safetensors"))
    found = real.state_dict()
    assert set(found) == set(expected)
    changed = 0
    before = to_hub(dict(native))
    for key, value in found.items():
        assert (value - expected[key]).norm() <= 1e-5 * value.norm(), key
        changed += not torch.equal(value, before[key])
    assert changed == sum(w.ndim == 2 for w in hub.values())
