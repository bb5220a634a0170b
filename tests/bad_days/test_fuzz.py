"""Damaged headers, configurations and indices: refused in one way, or read.

Mutations know the grammar: besides single bytes, values of JSON are replaced by others of any
type. ``--fuzz SECONDS`` tries longer.
"""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from samples import lora

import loratool
from loratool.errors import LoratoolError

Make = Callable[..., Path]
STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**63,
    1e308,
    0.5,
    "",
    "x",
    "\ud800",
    "\x1b[2J",
    ".*",
    "(",
    [],
    [[]],
    ["q_proj", 1],
    {},
    {"a": {"b": []}},
    "auto",
)
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 12,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "num_hidden_layers": 1,
    "text_config": {"vocab_size": 12},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]},
}
ADAPTER = {
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"^model.*": 8},
    "modules_to_save": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "exclude_modules": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_dropout": 0.1,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "auto_mapping": None,
    "base_model_name_or_path": "x",
    "eva_config": None,
}


def changed(value: Any, source: random.Random) -> Any:
    """Return a JSON value with one part of it replaced, left out, or moved to another key."""
    if isinstance(value, dict) and value and source.random() < 0.9:
        copy, key = dict(value), source.choice(list(value))
        kind = source.random()
        if kind < 0.7:
            copy[key] = changed(copy[key], source)
        elif kind < 0.8:
            del copy[key]
        else:
            copy[source.choice(["", "x", "\ud800", "format", key + "x"])] = copy.pop(key)
        return copy
    if isinstance(value, list) and value and source.random() < 0.6:
        copied = list(value)
        place = source.randrange(len(value))
        copied[place] = changed(copied[place], source)
        return copied
    return source.choice(STRANGE)


def flipped(data: bytes, source: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(source.choice([1, 1, 3])):
        damaged[source.randrange(len(damaged))] = source.randrange(256)
    return bytes(damaged)


def written(path: Path, whole: bytes, source: random.Random) -> None:
    """Damage a file: bytes of it, or what its JSON says."""
    if source.random() < 0.3:
        path.write_bytes(flipped(whole[:4096], source) + whole[4096:])
    elif path.suffix == ".json":
        path.write_text(json.dumps(changed(json.loads(whole), source)), "utf-8")
    else:
        (length,) = struct.unpack("<Q", whole[:8])
        header = json.dumps(changed(json.loads(whole[8 : 8 + length]), source)).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])


@pytest.fixture
def inputs(make_adapter: Make, tmp_path: Path) -> tuple[Path, Path]:
    """Return a base with an index, and an adapter that says all that it can."""
    base = tmp_path / "base"
    base.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.randn(12, 8),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8),
        "lm_head.weight": torch.randn(12, 8),
    }
    name = "model-00001-of-00001.safetensors"
    save_file(tensors, base / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1024}, "weight_map": dict.fromkeys(tensors, name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text(json.dumps(CONFIG))
    module = "model.layers.0.self_attn.q_proj"
    return base, make_adapter(lora(module, 8, 8), target_modules=["q_proj"], **ADAPTER)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    ],
)
def test_every_verb_refuses_or_reads(
    name: str, inputs: tuple[Path, Path], tmp_path: Path, fuzz_seconds: float
) -> None:
    base, adapter = inputs
    path = next(place / name for place in inputs if (place / name).is_file())
    whole, source = path.read_bytes(), random.Random(name)
    verbs: list[Callable[[], object]] = [
        lambda: loratool.inspect(adapter).as_json(),
        lambda: loratool.inspect(base),
        lambda: loratool.validate(adapter, base=base),
        lambda: loratool.merge(base, [adapter], tmp_path / "out", force=True),
        lambda: loratool.convert(adapter, "kohya", tmp_path / "k.safetensors", force=True),
        lambda: loratool.convert(adapter, "mlx", tmp_path / "mlx", force=True),
        lambda: loratool.truncate(adapter, rank=1, output=tmp_path / "t", force=True),
        lambda: loratool.rescale(adapter, output=tmp_path / "r", scale=0.5, force=True),
        lambda: loratool.compare([adapter, adapter]),
        lambda: loratool.extract(base, base, tmp_path / "e", rank=1, force=True),
    ]
    counts = {"read": 0, "refused": 0}
    messages: list[str] = []
    end = time.monotonic() + fuzz_seconds
    while time.monotonic() < end or not min(counts.values()):
        written(path, whole, source)
        damaged = path.read_bytes()
        for verb in verbs:
            try:
                verb()
                counts["read"] += 1
            except LoratoolError as error:
                counts["refused"] += 1
                messages.append(str(error))
            except Exception as error:
                error.add_note(f"{name}: {damaged[:2000]!r}")
                raise
    assert not [message for message in messages if len(message) > 4000]
