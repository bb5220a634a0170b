"""Where the samples are, the smallest ones, and where an adapter of a scheme may be written."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loratool.names.positions import text_paths, unet_paths
from loratool.schemes import scheme_named, scheme_names

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
SCHEMES = tuple(name for name in scheme_names() if scheme_named(name).is_written)
FOLDERS = tuple(name for name in SCHEMES if scheme_named(name).settings.file)
NARROW = {
    "onetrainer": "transformer.single_transformer_blocks.{}.proj_mlp",
    "xlabs": "transformer.double_blocks.{}.img_attn.proj",
}
"""Schemes with names for the modules of some models alone, and modules of one."""


def place(folder: Path, scheme: str, name: str) -> Path:
    """Return where an adapter of ``scheme`` may be written."""
    if scheme in FOLDERS:
        return folder / name
    return folder / f"{name}{scheme_named(scheme).home.suffix}"


def lora(module: str, out: int, into: int, rank: int = 4, **kinds: Any) -> dict[str, torch.Tensor]:
    """Return random factors for one linear module."""
    return {
        f"{module}.lora_A.weight": torch.randn(rank, into, **kinds),
        f"{module}.lora_B.weight": torch.randn(out, rank, **kinds),
    }


def stable_diffusion(path: Path, *, alpha: float | None, rank: int = 2, width: int = 8) -> Path:
    """Write a kohya adapter of a small Stable Diffusion: U-Net and text encoder."""
    unet, text = unet_paths(), text_paths(8)
    assert unet is not None and text is not None
    tensors = {}
    for prefix, paths in (("lora_unet_", unet), ("lora_te_", text)):
        for module in paths:
            name = prefix + module.replace(".", "_")
            out = 64 if module.endswith("ff.net.0.proj") else width
            tensors[f"{name}.lora_down.weight"] = torch.randn(rank, width)
            tensors[f"{name}.lora_up.weight"] = torch.randn(out, rank)
            if alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def contents() -> dict[str, Any]:
    """Return what a checkpoint may hold: views, shared tensors, numbers, texts, nesting."""
    x = torch.randn(6, 8)
    return collections.OrderedDict(
        plain=x,
        half=x.bfloat16(),
        transposed=x.T,
        view=x[1:4, 2:],
        alias=x,
        parameter=torch.nn.Parameter(torch.randn(3)),
        numbers=torch.arange(5),
        scalar=torch.tensor(2.5),
        nested={"inner": x[0].clone()},
        epoch=3,
        name="run",
    )
