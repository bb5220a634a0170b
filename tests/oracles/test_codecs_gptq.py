"""GPTQ and AWQ as their own libraries have stored them, and given them back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loratool.base.model import open_model
from loratool.codecs.codec import CodedTensor
from loratool.codecs.weights import read_matrix
from loratool.files.inputs import InputFiles

FOLDER = Path(__file__).parents[2] / "fixtures" / "quantised"
HALF = 2.0**-11
EXACT = 1e-9
LIBRARIES = {"auto-gptq": HALF, "gptqmodel": EXACT, "auto-round": HALF, "autoawq": HALF}
"""By how much of a weight the libraries' own products are rounded."""


def cases() -> list[tuple[str, str]]:
    found = []
    for library in LIBRARIES:
        with safe_open(FOLDER / f"{library}.safetensors", "pt") as file:
            found += [(library, name) for name in sorted(file.metadata())]
    return found


def recorded(library: str, name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict]:
    with safe_open(FOLDER / f"{library}.safetensors", "pt") as file:
        parts = {
            key.removeprefix(f"{name}."): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118 - it is no mapping
            if key.startswith(f"{name}.")
        }
        return parts, parts.pop("truth"), json.loads(file.metadata()[name])


def test_all_libraries_are_recorded() -> None:
    assert len(cases()) == 4 + 8 + 14 + 4


@pytest.mark.parametrize(("library", "name"), cases())
def test_a_weight_is_what_its_library_makes_of_it(library: str, name: str, tmp_path: Path) -> None:
    parts, truth, config = recorded(library, name)
    save_file({f"m.{leaf}": part for leaf, part in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    weight = open_model(tmp_path).tensors["m.weight"]
    assert isinstance(weight, CodedTensor)
    files = InputFiles({})
    found = read_matrix(weight, files)
    files.close()
    expected = truth.double().numpy()
    assert found.shape == expected.shape
    error = np.abs(found - expected)
    assert (error <= LIBRARIES[library] * np.abs(expected) + 1e-9).all(), error.max()
