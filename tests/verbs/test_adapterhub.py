"""AdapterHub's adapters: names, and the scale as the library loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deltas import dense_deltas, relative_error

import loratool
from loratool.errors import LoratoolError, UnsupportedError

QUERY = "bert.encoder.layer.0.attention.self.query"
FUSED = "transformer.h.0.attn.c_attn"


def write(folder: Path, version: str | None = "adapters.1.2.0", **changes: Any) -> dict[str, Any]:
    method = {"architecture": "lora", "r": 4, "alpha": 16, "composition_mode": "add"}
    method |= {"attn_matrices": ["q", "v"], "use_gating": False, "vera_d": None}
    said = {"config": {**method, **changes}, "name": "style", "model_type": "bert"}
    if version is not None:
        said["version"] = version
    tensors = {
        f"{QUERY}.loras.style.lora_A": torch.randn(4, 12),
        f"{QUERY}.loras.style.lora_B": torch.randn(16, 4),
        f"{FUSED}.loras.style.lora_A": torch.randn(8, 12),
        f"{FUSED}.loras.style.lora_B": torch.randn(24, 4),
    }
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_adapter.bin")
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return tensors


@pytest.mark.parametrize(
    ("version", "scale"),
    [
        ("adapters.1.2.0", 4.0),
        ("adapters.1.0.1", 1.0),
        ("adapters.0.2.1", 1.0),
        ("3.2.1", 4.0),
        (None, 4.0),
    ],
)
def test_the_scale_is_that_of_the_library(
    version: str | None, scale: float, tmp_path: Path
) -> None:
    tensors = write(tmp_path / "hub", version)
    loratool.convert(tmp_path / "hub", "peft", tmp_path / "peft")
    a, b = (tensors[f"{FUSED}.loras.style.lora_{side}"].double() for side in "AB")
    fused = torch.zeros(36, 12).double()
    fused[:12], fused[24:] = b[:12] @ a[:4], b[12:] @ a[4:]
    a, b = (tensors[f"{QUERY}.loras.style.lora_{side}"].double() for side in "AB")
    truth = {QUERY: scale * (b @ a), FUSED: scale * fused}
    assert relative_error(dense_deltas(tmp_path / "peft"), truth) < 1e-6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"composition_mode": "scale", "r": 1}, "composition_mode"),
        ({"use_gating": True}, "gate"),
        ({"vera_d": 0.1}, "VeRA"),
        ({"architecture": "reft"}, "reft"),
    ],
)
def test_what_is_no_sum_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    write(tmp_path / "hub", **changes)
    with pytest.raises(UnsupportedError, match=words):
        loratool.open_adapter(tmp_path / "hub")


def test_it_is_not_written(tmp_path: Path) -> None:
    write(tmp_path / "hub")
    with pytest.raises(UnsupportedError, match="not written") as caught:
        loratool.convert(tmp_path / "hub", "adapterhub", tmp_path / "x")
    assert "--to peft" in str(caught.value.hint)
    (tmp_path / "hub" / "adapter_config.json").write_text('{"config": {"r": "4", "alpha": 1}}')
    with pytest.raises(LoratoolError, match=r"config\.r is '4'"):
        loratool.open_adapter(tmp_path / "hub")
