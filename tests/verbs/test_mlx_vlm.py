"""mlx-vlm's first layers: bare ``A`` and ``B``, multiplied by alpha itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from deltas import dense_deltas, relative_error
from safetensors.torch import save_file

import loratool
from loratool.errors import LoratoolError

MODULE = "language_model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("out", [16, 12])
def test_alpha_is_the_scale(out: int, tmp_path: Path) -> None:
    a, b = torch.randn(12, 4), torch.randn(4, out)
    folder = tmp_path / "mlx"
    folder.mkdir()
    save_file({f"{MODULE}.A": a, f"{MODULE}.B": b}, folder / "adapters.safetensors")
    said = {"rank": 4, "alpha": 0.1, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    assert loratool.open_adapter(folder).scheme == "mlx"
    loratool.convert(folder, "peft", tmp_path / "peft")
    truth = {MODULE: 0.1 * (a.double() @ b.double()).T}
    assert relative_error(dense_deltas(tmp_path / "peft"), truth) < 1e-6
    (note,) = loratool.open_adapter(folder).notes
    assert "before release 0.5" in note and note.endswith("loratool rescale --scale 0.25")
    loratool.rescale(folder, tmp_path / "weaker", scale=0.25)
    assert not loratool.open_adapter(tmp_path / "weaker").notes
    loratool.convert(tmp_path / "weaker", "peft", tmp_path / "peft2")
    truth = {MODULE: 0.1 / 4 * (a.double() @ b.double()).T}
    assert relative_error(dense_deltas(tmp_path / "peft2"), truth) < 1e-6


def test_todays_configuration_says_the_scale_itself(tmp_path: Path) -> None:
    """As mlx-vlm 0.6 and later save it: alpha / rank was divided when the layers were made."""
    a, b = torch.randn(12, 4), torch.randn(4, 16)
    folder = tmp_path / "mlx"
    folder.mkdir()
    save_file({f"{MODULE}.lora_a": a, f"{MODULE}.lora_b": b}, folder / "adapters.safetensors")
    parameters = {"rank": 4, "dropout": 0.0, "scale": 16 / 4, "keys": [MODULE]}
    said = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    loratool.convert(folder, "peft", tmp_path / "peft")
    truth = {MODULE: 4.0 * (a.double() @ b.double()).T}
    assert relative_error(dense_deltas(tmp_path / "peft"), truth) < 1e-6
    assert not loratool.open_adapter(folder).notes


def test_letters_that_are_no_factors_are_none(tmp_path: Path) -> None:
    tensors = {"layer.A": torch.ones(4, 4, 2), "layer.B": torch.ones(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LoratoolError, match="no known scheme"):
        loratool.open_adapter(tmp_path / "a.safetensors")
