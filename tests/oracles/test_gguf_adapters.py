"""Adapters in GGUF are what llama.cpp's own converter makes, and what the gguf package reads.

``fixtures/llamacpp/record_adapters.py`` recorded what the converter made, as hashes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import pytest
import tiny_gguf as tiny
from safetensors.numpy import load_file
from samples import FIXTURES

import loratool
from loratool.names.gguf import architecture_named
from loratool.names.gguf.rows import HEADLESS
from loratool.names.gguf.tables import ARCHITECTURES

RECORDED: Final[dict[str, Any]] = json.loads((FIXTURES / "llamacpp" / "adapters.json").read_text())
TURNED: Final = ("gpt2",)
"""Where the converter turns what PEFT has the right way round already, and cannot load it then."""


def tensors_of(path: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    found = gguf.GGUFReader(path).tensors
    return {one.name: (tuple(map(int, one.data.shape)), one.data.tobytes()) for one in found}


@pytest.mark.parametrize("name", [name for name in RECORDED if name not in TURNED])
def test_it_is_what_the_converter_makes(name: str, tmp_path: Path) -> None:
    said = RECORDED[name]
    base = tiny.write_base(tmp_path / "base", name)
    adapter = tiny.write_adapter(tmp_path / "adapter", name, said["keep"])
    report = loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    assert report.is_exact
    reader = gguf.GGUFReader(tmp_path / "made.gguf")
    assert reader.fields["general.architecture"].contents() == said["architecture"]
    assert reader.fields["adapter.lora.alpha"].contents() == said["alpha"]
    assert tiny.hashes(tensors_of(tmp_path / "made.gguf")) == said["tensors"]


def test_nearly_all_architectures_are_recorded() -> None:
    assert set(ARCHITECTURES) - set(RECORDED) == {"mistral3", "gemma3", "gemma3n"}


def is_read_back(name: str) -> bool:
    """Whether no tensor is a part of what transformers has in one."""
    linear, _ = tiny.modules(name)
    architecture = architecture_named(name)
    assert architecture is not None
    held = (architecture.held(module) for module in linear)
    return all(len(each) == 1 for each in held) and name != "falcon"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", name)
    adapter = tiny.write_adapter(tmp_path / "adapter", name)
    loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    if not is_read_back(name):
        with pytest.raises(loratool.LoratoolError, match=r"fused|same as another"):
            loratool.convert(tmp_path / "made.gguf", "peft", tmp_path / "back", base=base)
        return
    loratool.convert(tmp_path / "made.gguf", "peft", tmp_path / "back", base=base)
    back, wanted = load_file(tmp_path / "back/adapter_model.safetensors"), tiny.factors(name)
    assert back.keys() == wanted.keys()
    assert all(np.array_equal(back[key], wanted[key]) for key in wanted)
    config = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (tiny.RANK, 2 * tiny.RANK)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_are_those_of_the_package(name: str) -> None:
    """Every module is what the package calls it, but for what the converter makes of it itself."""
    number = next(n for n, found in gguf.MODEL_ARCH_NAMES.items() if found == name)
    known = gguf.get_tensor_name_map(number, 2)
    tensors = {tensor for _, tensor in known.mapping.values()}
    for module, tensor, form in ARCHITECTURES[name]:
        path = module.replace("*", "1").replace(".#", "")
        wanted = tensor.replace("*", "1")
        assert wanted in tensors
        found = {known.get_name(path), known.get_name(path.removeprefix("transformer."))} - {None}
        if not form and "shared_mlp.output" not in module:
            assert found == {wanted}, module
        elif form in HEADLESS and form:
            assert found <= {wanted, "blk.1.ffn_gate_up_exps", "blk.1.ffn_up"}, module
        else:
            assert found <= {wanted, "blk.1.attn_qkv", "blk.1.ffn_down_shexp"}, module
