"""Numbered factors of SAM's research code: queries and values of a fused projection."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
import torch
from deltas import dense_deltas, relative_error
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import LoratoolError

BLOCKS, WIDTH, RANK = 3, 8, 2
PREFIX: Final = "image_encoder.blocks"


def write(folder: Path, blocks: int = BLOCKS) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Write an adapter and its base; return both, and the deltas."""
    tensors, truth, weights = {}, {}, {}
    for block in range(blocks):
        whole = torch.zeros(3 * WIDTH, WIDTH).double()
        for place, rows in enumerate((slice(0, WIDTH), slice(2 * WIDTH, 3 * WIDTH))):
            a, b = torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)
            tensors[f"w_a_{2 * block + place:03d}"] = a
            tensors[f"w_b_{2 * block + place:03d}"] = b
            whole[rows] = b.double() @ a.double()
        truth[f"{PREFIX}.{block}.attn.qkv"] = whole
    for block in range(BLOCKS):
        weights[f"{PREFIX}.{block}.attn.qkv.weight"] = torch.randn(3 * WIDTH, WIDTH)
        weights[f"{PREFIX}.{block}.attn.proj.weight"] = torch.randn(WIDTH, WIDTH)
    save_file(tensors, folder / "lora.safetensors")
    save_file(weights, folder / "sam.safetensors")
    return folder / "lora.safetensors", folder / "sam.safetensors", truth


@pytest.mark.parametrize("alpha", [None, 4.0])
def test_converted_and_merged(alpha: float | None, tmp_path: Path) -> None:
    adapter, base, truth = write(tmp_path)
    truth = {name: delta * ((alpha or RANK) / RANK) for name, delta in truth.items()}
    for scheme in ("peft", "kohya", "module-path"):
        out = tmp_path / scheme if scheme == "peft" else tmp_path / f"{scheme}.safetensors"
        report = loratool.convert(adapter, scheme, out, base=base, alpha=alpha)
        assert report.relative_error < 1e-6
        loratool.convert(out, "peft", tmp_path / f"{scheme}-back", base=base)
        assert relative_error(dense_deltas(tmp_path / f"{scheme}-back"), truth) < 1e-6
    loratool.merge(base, [adapter], tmp_path / "out.safetensors", alpha=alpha)
    merged, weights = load_file(tmp_path / "out.safetensors"), load_file(base)
    for name, delta in truth.items():
        found, weight = merged[f"{name}.weight"].double(), weights[f"{name}.weight"].double()
        torch.testing.assert_close(found, weight + delta, rtol=1e-6, atol=1e-5)


def test_nothing_is_guessed(tmp_path: Path) -> None:
    adapter, base, _ = write(tmp_path, blocks=2)
    for given in (None, base):
        with pytest.raises(LoratoolError, match="no names"):
            loratool.convert(adapter, "peft", tmp_path / "x", base=given)
    info = loratool.inspect(adapter).as_json()
    assert [(m["rank"], m["out_features"], m["in_features"]) for m in info["modules"]] == [
        (RANK, 3 * WIDTH, WIDTH)
    ] * 2
    assert info["scheme"] == "numbered"


def test_broken_pairs_are_named(tmp_path: Path) -> None:
    adapter, base, _ = write(tmp_path)
    tensors = load_file(adapter)
    tensors["w_b_001"] = torch.randn(WIDTH + 1, RANK)
    save_file(tensors, adapter)
    with pytest.raises(LoratoolError, match="unlike sizes"):
        loratool.convert(adapter, "peft", tmp_path / "x", base=base)
    del tensors["w_b_001"]
    save_file(tensors, adapter)
    with pytest.raises(LoratoolError, match="not two pairs"):
        loratool.open_adapter(adapter)
