"""A model in either naming, an adapter in either naming: four merges, and all are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import pytest
import tiny_gguf as tiny
from safetensors.numpy import load_file, save_file

import loratool
from loratool.errors import LoratoolError
from loratool.names.gguf import Attention, architecture_named

ALL: Final = (
    *("llama", "qwen2", "qwen3moe", "deepseek", "granite", "phi3", "chatglm", "olmo2"),
    *("gpt2", "bloom", "gptneox", "falcon", "starcoder2", "exaone", "minicpm3", "deepseek2"),
    *("internlm2", "baichuan", "ernie4_5", "gpt-oss", "stablelm", "nemotron"),
)
FUSED: Final = ("internlm2", "falcon", "baichuan")
"""Where a file of llama.cpp has several tensors, or sorted rows, for one module."""


def weights_of(name: str) -> dict[str, np.ndarray[Any, Any]]:
    """Return random weights of a tiny model as transformers has them."""
    linear, tables = tiny.modules(name)
    random = np.random.default_rng(7)
    found = {f"{m}.weight": random.standard_normal((tiny.TOKENS, tiny.HIDDEN)) for m in tables}
    for module, (out, into) in linear.items():
        sides = (into, out) if name == "gpt2" and ".h." in module else (out, into)
        found[f"{module}.weight"] = random.standard_normal(sides)
    return {key: values.astype(np.float32) for key, values in found.items()}


def as_gguf(weights: dict[str, np.ndarray[Any, Any]], name: str) -> dict[str, Any]:
    """Return weights of transformers as llama.cpp has them."""
    architecture = architecture_named(name)
    assert architecture is not None
    attention = Attention((tiny.HEADS,), (tiny.key_heads(name),))
    made: dict[str, Any] = {}
    stacks: dict[str, dict[int, np.ndarray[Any, Any]]] = {}
    for key, values in weights.items():
        module = key.removesuffix(".weight")
        matrix = values.T if name == "gpt2" and ".h." in module else values
        for held in architecture.held(module):
            rows = held.rows(attention).of_module(len(matrix), module).indices()
            if held.expert is None:
                made[f"{held.tensor}.weight"] = np.ascontiguousarray(matrix[rows])
            else:
                stacks.setdefault(f"{held.tensor}.weight", {})[held.expert] = matrix[rows]
    made |= {key: np.stack([one[n] for n in sorted(one)]) for key, one in stacks.items()}
    return made


def write(folder: Path, name: str) -> tuple[Path, Path, Path, Path]:
    """Write both models and both adapters."""
    base = tiny.write_base(folder / "base", name)
    weights = weights_of(name)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    writer = gguf.GGUFWriter(folder / "base.gguf", name)
    writer.add_head_count(tiny.HEADS)
    writer.add_head_count_kv(tiny.key_heads(name))
    writer.add_block_count(tiny.LAYERS)
    writer.add_embedding_length(tiny.HIDDEN)
    for key, values in as_gguf(weights, name).items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter = tiny.write_adapter(folder / "peft", name)
    loratool.convert(adapter, "gguf", folder / "adapter.gguf", base=base)
    return base, folder / "base.gguf", adapter, folder / "adapter.gguf"


def tensors_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {one.name: np.array(one.data) for one in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", ALL)
def test_merges_are_the_same(name: str, tmp_path: Path) -> None:
    base, model, peft, adapter = write(tmp_path, name)
    loratool.merge(base, [peft], tmp_path / "one")
    truth = as_gguf(load_file(tmp_path / "one" / "model.safetensors"), name)
    before = as_gguf(weights_of(name), name)
    assert all(not np.array_equal(truth[key], before[key]) for key in truth)

    loratool.merge(model, [adapter], tmp_path / "both.gguf")
    found = tensors_of(tmp_path / "both.gguf")
    assert found.keys() == truth.keys()
    for key, values in truth.items():
        assert np.allclose(found[key], values, rtol=1e-6, atol=1e-6), key

    loratool.merge(model, [peft], tmp_path / "mixed.gguf")
    found = tensors_of(tmp_path / "mixed.gguf")
    for key, values in truth.items():
        assert np.allclose(found[key], values, rtol=1e-6, atol=1e-6), key

    if name in FUSED:
        with pytest.raises(LoratoolError, match="fused projections"):
            loratool.merge(base, [adapter], tmp_path / "other")
        return
    loratool.merge(base, [adapter], tmp_path / "other")
    found = as_gguf(load_file(tmp_path / "other" / "model.safetensors"), name)
    for key, values in truth.items():
        assert np.allclose(found[key], values, rtol=1e-6, atol=1e-6), key


def test_what_both_namings_have_is_validated(tmp_path: Path) -> None:
    base, model, peft, adapter = write(tmp_path, "llama")
    for one in (base, model):
        for other in (peft, adapter):
            found = loratool.validate(other, base=one)
            assert not [each for each in found if each.severity == "error"], (one, found)


def test_a_file_of_a_model_tells_the_heads(tmp_path: Path) -> None:
    _, model, peft, _ = write(tmp_path, "llama")
    loratool.convert(peft, "gguf", tmp_path / "told.gguf", base=model)
    one, other = tensors_of(tmp_path / "told.gguf"), tensors_of(tmp_path / "adapter.gguf")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)
