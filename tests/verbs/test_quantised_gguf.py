"""Merging into GGUF files, what they say of themselves, and comparing two of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratool
from loratool.errors import LoratoolError
from loratool.files.containers import open_weights

gguf = pytest.importorskip("gguf")
from gguf_files import LLAMA, QWEN2, paired, read_gguf, write_gguf  # noqa: E402

CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
HEAD = 16
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


def weights(*, is_tied: bool = False, has_bias: bool = False) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.1).astype(np.float32)

    found = {"model.embed_tokens.weight": some(40, 64), "model.norm.weight": 1 + some(64)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for module, shape in SHAPES.items():
            found[f"{prefix}{module}.weight"] = some(*shape)
            if has_bias and module.startswith("self_attn") and "o_proj" not in module:
                found[f"{prefix}{module}.bias"] = some(shape[0])
        found[f"{prefix}input_layernorm.weight"] = 1 + some(64)
        found[f"{prefix}post_attention_layernorm.weight"] = 1 + some(64)
    if not is_tied:
        found["lm_head.weight"] = some(40, 64)
    return found


def adapter(
    folder: Path, modules: tuple[str, ...] = tuple(SHAPES), rank: int = 3
) -> dict[str, np.ndarray]:
    """Write an adapter of PEFT; return its deltas in float64 by module."""
    random = np.random.default_rng(1)
    tensors, deltas = {}, {}
    shapes = {**SHAPES, "embed_tokens": (40, 64), "lm_head": (40, 64)}
    for module in modules:
        paths = [f"model.layers.{layer}.{module}" for layer in range(2)]
        if module == "embed_tokens":
            paths = ["model.embed_tokens"]
        if module == "lm_head":
            paths = ["lm_head"]
        out, into = shapes[module]
        for path in paths:
            down = random.standard_normal((rank, into)).astype(np.float32)
            up = (random.standard_normal((out, rank)) * 0.05).astype(np.float32)
            key = f"base_model.model.{path}"
            if module == "embed_tokens":
                tensors[f"{key}.lora_embedding_A"] = np.ascontiguousarray(up.T)
                tensors[f"{key}.lora_embedding_B"] = np.ascontiguousarray(down.T)
            else:
                tensors[f"{key}.lora_A.weight"] = down
                tensors[f"{key}.lora_B.weight"] = up
            deltas[path] = 2.0 * up.astype("f8") @ down.astype("f8")
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def stored_delta(path: str, delta: np.ndarray, change: Any = LLAMA[1]) -> np.ndarray:
    return change(f"{path}.weight", delta, CONFIG)


def stored_name(path: str) -> str:
    from gguf_files import names

    return f"{names(2)[path]}.weight"


@pytest.mark.parametrize("architecture", [LLAMA, QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0", "Q4_0", "Q5_1", "MXFP4"])
def test_a_merge_changes_what_the_adapter_does_and_nothing_else(
    dtype: str, architecture: Any, tmp_path: Path
) -> None:
    types = {"embed_tokens": "Q8_0", "lm_head": "F16", "": dtype}
    base = write_gguf(tmp_path / "base.gguf", weights(), CONFIG, architecture, types)
    deltas = adapter(tmp_path / "adapter")
    report = loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out.gguf")
    assert report.merged == 14
    before, after = read_gguf(base), read_gguf(tmp_path / "out.gguf")
    assert list(before) == list(after)
    touched = {stored_name(path): (path, delta) for path, delta in deltas.items()}
    for name, (kind, values, raw) in before.items():
        if name not in touched:
            assert after[name][0] == kind and after[name][2] == raw
            continue
        path, delta = touched[name]
        wanted = values.astype("f8") + stored_delta(path, delta, architecture[1])
        kept = dtype if dtype in ("F32", "F16") else "F16"
        assert after[name][0] == kept
        np.testing.assert_allclose(
            after[name][1], wanted, rtol=2.0**-11 if kept == "F16" else 2.0**-20, atol=1e-7
        )
    one, two = open_weights(base), open_weights(tmp_path / "out.gguf")
    assert one.raw_values == two.raw_values and one.alignment == two.alignment  # type: ignore[attr-defined]
    assert loratool.verify(tmp_path / "out.gguf", base=base, adapters=[tmp_path / "adapter"]) == ()
