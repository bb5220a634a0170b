"""A small GGUF file that is kept: read without the package, as the package has read it."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from samples import FIXTURES

import loratool
from loratool.base.model import open_model
from loratool.codecs.weights import read_matrix
from loratool.files.inputs import InputFiles
from loratool.verbs.inspect import ModelInfo

BASE = FIXTURES / "llamacpp" / "llama-mixed.gguf"
RECORDED = json.loads((FIXTURES / "llamacpp" / "llama-mixed.json").read_text())["values"]


@pytest.fixture(autouse=True)
def _without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)


def test_all_types_are_read_as_recorded() -> None:
    model = open_model(BASE)
    files = InputFiles(model.stamps)
    found = {name: read_matrix(weight, files) for name, weight in model.tensors.items()}
    files.close()
    assert found.keys() == RECORDED.keys()
    for name, values in found.items():
        digest = hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()[:16]
        assert digest == RECORDED[name], name


def test_what_it_is() -> None:
    info = loratool.inspect(BASE)
    assert isinstance(info, ModelInfo)
    assert (info.model_type, info.is_tied, len(info.dtypes)) == ("llama", True, 16)
    assert info.metadata["general.name"] == "Tiny mixture"


def test_an_adapter_is_merged_into_every_type(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    model = open_model(BASE)
    tensors, deltas = {}, {}
    for path, name in model.modules.items():
        shape = model.tensors[name].spec.shape
        if len(shape) == 2 and "layers" in path:
            down = random.standard_normal((2, shape[1])).astype("f4")
            up = random.standard_normal((shape[0], 2)).astype("f4") * 0.1
            tensors[f"base_model.model.{path}.lora_A.weight"] = down
            tensors[f"base_model.model.{path}.lora_B.weight"] = up
            deltas[path] = up.astype("f8") @ down
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    report = loratool.merge(BASE, [folder], tmp_path / "out.gguf")
    assert report.merged == 14
    before, after = open_model(BASE), open_model(tmp_path / "out.gguf")
    files = InputFiles({})
    for path, delta in deltas.items():
        name = before.modules[path]
        wanted = read_matrix(before.tensors[name], files)
        if path.endswith(("q_proj", "k_proj")):
            delta = delta.reshape(-1, 2, 8, 256).swapaxes(1, 2).reshape(delta.shape)
        np.testing.assert_allclose(
            read_matrix(after.tensors[name], files), wanted + delta, rtol=2.0**-8, atol=1e-7
        )
    files.close()
    assert loratool.verify(tmp_path / "out.gguf", base=BASE, adapters=[folder]) == ()
