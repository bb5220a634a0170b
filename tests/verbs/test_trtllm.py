"""TensorRT-LLM's pair of arrays, as its converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from deltas import dense_deltas, relative_error
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import FileFormatError, LoratoolError, UnsupportedError

HIDDEN, HEADS, GROUPS, SIZE, INNER, RANK = 12, 4, 2, 4, 20, 3
QUERY, KEY = HEADS * SIZE, GROUPS * SIZE
LLAMA: Final = {
    "self_attn.q_proj": (1, QUERY, HIDDEN),
    "self_attn.k_proj": (2, KEY, HIDDEN),
    "self_attn.v_proj": (3, KEY, HIDDEN),
    "self_attn.o_proj": (4, HIDDEN, QUERY),
    "mlp.gate_proj": (5, INNER, HIDDEN),
    "mlp.down_proj": (6, HIDDEN, INNER),
    "mlp.up_proj": (7, INNER, HIDDEN),
}


def write(
    folder: Path, rows: list[tuple[int, int, np.ndarray, np.ndarray]], dtype: Any = np.float32
) -> None:
    """Write rows: module, layer, A, B."""
    folder.mkdir(exist_ok=True)
    flat = [np.concatenate([a.ravel(), b.ravel()]) for _, _, a, b in rows]
    longest = max(map(len, flat))
    whole = np.stack([np.pad(row, (0, longest - len(row))) for row in flat])[None].astype(dtype)
    if dtype is np.uint32:  # the upper halves of float32
        whole = np.stack([np.pad(row, (0, longest - len(row))) for row in flat])[None]
        bits = whole.astype(np.float32).view(np.uint32)
        whole = (bits >> 16).astype(np.uint16).view("V2")
    said = np.array([[(m, layer, len(a)) for m, layer, a, _ in rows]], dtype=np.int32)
    np.save(folder / "model.lora_weights.npy", whole)
    np.save(folder / "model.lora_config.npy", said)


def factors(out: int, into: int) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers that all dtypes hold."""
    draw = np.random.default_rng(out * into)
    return draw.integers(-8, 8, (RANK, into)) / 4.0, draw.integers(-8, 8, (out, RANK)) / 4.0


def base(folder: Path, architecture: str = "LlamaForCausalLM", **changes: int) -> Path:
    folder.mkdir()
    config = {"architectures": [architecture], "num_attention_heads": HEADS}
    config |= {"num_key_value_heads": GROUPS, "head_dim": SIZE, "hidden_size": HIDDEN}
    config |= {"intermediate_size": INNER, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        f"model.layers.{layer}.{leaf}.weight": torch.zeros(out, into)
        for layer in range(2)
        for leaf, (_, out, into) in LLAMA.items()
    }
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint32])
def test_converted_and_merged(dtype: Any, tmp_path: Path) -> None:
    rows, truth = [], {}
    for layer in range(2):
        for leaf, (module, out, into) in LLAMA.items():
            a, b = factors(out, into)
            rows.append((module, layer, a, b))
            truth[f"model.layers.{layer}.{leaf}"] = torch.from_numpy(b @ a)
    write(tmp_path / "trt", rows, dtype)
    model = base(tmp_path / "base")
    loratool.convert(tmp_path / "trt", "peft", tmp_path / "peft", base=model)
    assert relative_error(dense_deltas(tmp_path / "peft"), truth) < 1e-6
    loratool.merge(model, [tmp_path / "trt" / "model.lora_config.npy"], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for module, delta in truth.items():
        torch.testing.assert_close(merged[f"{module}.weight"].double(), delta)


def test_fused_rows_are_their_projections(tmp_path: Path) -> None:
    a, b = factors(QUERY + 2 * KEY, HIDDEN)
    c, d = factors(2 * INNER, HIDDEN)
    write(tmp_path / "trt", [(0, 0, a, b), (5, 0, c, d)])
    model = base(tmp_path / "base", "Phi3ForCausalLM")
    loratool.convert(tmp_path / "trt", "peft", tmp_path / "peft", base=model)
    found = dense_deltas(tmp_path / "peft")
    whole = [found[f"model.layers.0.self_attn.{side}_proj"] for side in "qkv"]
    assert np.array_equal(torch.cat(whole).numpy(), b @ a)
    halves = [found[f"model.layers.0.mlp.{side}_proj"] for side in ("up", "gate")]
    assert np.array_equal(torch.cat(halves).numpy(), d @ c)


def test_nothing_is_guessed(tmp_path: Path) -> None:
    write(tmp_path / "trt", [(1, 0, *factors(QUERY, HIDDEN))])
    with pytest.raises(LoratoolError, match="one after the other"):
        loratool.convert(tmp_path / "trt", "peft", tmp_path / "x")
    for name, changes in (("small", {"hidden_size": 8}), ("large", {"hidden_size": 16})):
        other = base(tmp_path / name, **changes)
        with pytest.raises(LoratoolError, match="numbers") as caught:
            loratool.convert(tmp_path / "trt", "peft", tmp_path / "x", base=other)
        assert "base" in str(caught.value.hint)


def test_broken_pairs(tmp_path: Path) -> None:
    folder = tmp_path / "trt"
    write(folder, [(1, 0, *factors(QUERY, HIDDEN))])
    np.save(folder / "model.lora_config.npy", np.array([[(1, 0, 3, 1)]], dtype=np.int32))
    with pytest.raises(UnsupportedError, match="DoRA"):
        loratool.convert(folder, "peft", tmp_path / "x", base=base(tmp_path / "base"))
    for table in ([[(1, 0, 3), (2, 0, 3)]], [[(1, 0, -3)]], [[(1, 0)]]):
        np.save(folder / "model.lora_config.npy", np.array(table, dtype=np.int32))
        with pytest.raises(FileFormatError):
            loratool.open_adapter(folder)
    np.save(folder / "model.lora_config.npy", np.array([[(1.0, 0.0, 3.0)]]))
    with pytest.raises(FileFormatError, match="int32"):
        loratool.open_adapter(folder)
    (folder / "model.lora_config.npy").unlink()
    with pytest.raises(FileFormatError) as caught:
        loratool.open_adapter(folder)
    assert "both files" in str(caught.value.hint)
    np.save(tmp_path / "other.npy", np.zeros(3))
    with pytest.raises(FileFormatError, match="no name"):
        loratool.open_adapter(tmp_path / "other.npy")


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_it_is_written_as_its_converter_writes_it(dtype: str, tmp_path: Path) -> None:
    rows, tensors = [], {}
    kind = {"F32": torch.float32, "F16": torch.float16}[dtype]
    for layer in (0, 10, 9):
        for leaf in ("mlp.down_proj", "self_attn.q_proj"):
            module, out, into = LLAMA[leaf]
            a, b = factors(out, into)
            name = f"base_model.model.model.layers.{layer}.{leaf}"
            tensors[f"{name}.lora_A.weight"] = torch.from_numpy(a).to(kind)
            tensors[f"{name}.lora_B.weight"] = torch.from_numpy(b).to(kind)
            rows.append((module, layer, a, b * 2))
    (tmp_path / "peft").mkdir()
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(said))
    loratool.convert(tmp_path / "peft", "trtllm", tmp_path / "trt")
    rows.sort(key=lambda row: (row[1], row[0]))
    write(tmp_path / "truth", rows, np.float32 if dtype == "F32" else np.float16)
    for name in ("model.lora_weights.npy", "model.lora_config.npy"):
        found, wanted = ((tmp_path / folder / name).read_bytes() for folder in ("trt", "truth"))
        assert found == wanted, name


def test_bfloat16_is_written_as_bits(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_{side}.weight": torch.ones(2, 2).bfloat16() for side in "AB"}
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.convert(tmp_path / "a.safetensors", "trtllm", tmp_path / "trt")
    found = np.load(tmp_path / "trt" / "model.lora_weights.npy")
    assert found.dtype == np.dtype("V2") and found.shape == (1, 1, 8)
    assert found.view(np.uint16).tolist() == [[[0x3F80] * 8]]


def test_what_it_has_no_place_for(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    other = "transformer.h.0.attn.c_attn"
    pair = {f"{name}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    for tensors, match in (
        (pair | {f"{other}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, "no module"),
        (pair | {f"{name}.lora_magnitude_vector": torch.ones(2)}, "magnitudes"),
        (pair | {f"{name}.lora_A.weight": torch.ones(2, 2).half()}, "one array has one of"),
    ):
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(UnsupportedError, match=match) as caught:
            loratool.convert(tmp_path / "a.safetensors", "trtllm", tmp_path / "trt")
        assert caught.value.hint and not (tmp_path / "trt").exists()
