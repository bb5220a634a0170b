"""An adapter merged into a GGUF file of any architecture is what llama.cpp adds at run time.

That is told by the adapter in llama.cpp's own form, whose factors are those of its converter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf as tiny

import loratool
from loratool.errors import LoratoolError
from loratool.names.gguf.tables import ARCHITECTURES

gguf = pytest.importorskip("gguf")

ONE_TABLE = {"command-r", "cohere2", "gemma", "gemma2", "gemma3n"}
"""Where loaders know no head apart from the embedding."""


def tensors_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {one.name: np.array(one.data) for one in gguf.GGUFReader(path).tensors}


def deltas_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return what llama.cpp adds to each tensor, in float64."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    factors = tensors_of(path)
    found = {}
    for name in factors:
        stem = name.removesuffix(".lora_a")
        if stem == name:
            continue
        a, b = factors[name].astype("f8"), factors[f"{stem}.lora_b"].astype("f8")
        scale = alpha / b.shape[-1]
        if stem == "token_embd.weight":
            found[stem] = scale * a @ b.T
        else:
            found[stem] = scale * b @ a
    return found


def write_base(
    path: Path, architecture: str, shapes: dict[str, tuple[int, ...]]
) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_head_count(tiny.HEADS)
    writer.add_head_count_kv(tiny.key_heads(architecture))
    made = {}
    for name, shape in shapes.items():
        made[name] = random.integers(-8, 9, shape).astype(np.float32)
        writer.add_tensor(name, made[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_what_llama_cpp_adds(name: str, tmp_path: Path) -> None:
    folder = tiny.write_base(tmp_path / "base", name)
    adapter = tiny.write_adapter(tmp_path / "adapter", name)
    loratool.convert(adapter, "gguf", tmp_path / "adapter.gguf", base=folder)
    deltas = deltas_of(tmp_path / "adapter.gguf")
    if name == "granitehybrid":  # a layer has one of both, and the names are those of either
        either = {key for key in deltas if key.replace(".weight", "_shexp.weight") in deltas}
        deltas = {key: delta for key, delta in deltas.items() if key not in either}
    before = write_base(
        tmp_path / "base.gguf", name, {key: delta.shape for key, delta in deltas.items()}
    )
    skip = []
    if name in ONE_TABLE:
        with pytest.raises(LoratoolError, match=r"'token_embd\.weight' is both for them"):
            loratool.merge(tmp_path / "base.gguf", [adapter], tmp_path / "out.gguf")
        skip = ["embed_tokens", "token_embd", "word_embeddings"]
        deltas["token_embd.weight"] *= 0
    for number, path in enumerate((adapter, tmp_path / "adapter.gguf")):
        out = tmp_path / f"{number}.gguf"
        loratool.merge(tmp_path / "base.gguf", [path], out, skip=skip)
        after = tensors_of(out)
        assert after.keys() == before.keys()
        for key, delta in deltas.items():
            assert np.array_equal(after[key], (before[key] + delta).astype("f4")), key
