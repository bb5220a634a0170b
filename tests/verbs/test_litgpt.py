"""litgpt: stacked queries, keys and values, against its own way to apply them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from deltas import dense_deltas, relative_error
from safetensors.torch import save_file

import loratool
from loratool.errors import FileFormatError, LoratoolError, UnsupportedError
from loratool.files.yaml import read_flat_yaml

HEADS, GROUPS, SIZE, WIDTH, RANK, ALPHA = 4, 2, 4, 12, 3, 6
ROWS: Final = {"q": HEADS * SIZE, "k": GROUPS * SIZE, "v": GROUPS * SIZE}
FLAGS: Final = {"q": "lora_query", "k": "lora_key", "v": "lora_value"}
LAYERS: Final = {
    "attn.proj": ("self_attn.o_proj", 12, 16),
    "mlp.fc_1": ("mlp.gate_proj", 20, 12),
    "mlp.fc_2": ("mlp.up_proj", 20, 12),
    "mlp.proj": ("mlp.down_proj", 12, 20),
}
MODEL: Final = (
    f"attn_bias: null\nn_embd: {WIDTH}\nn_head: {HEADS}\nn_query_groups: {GROUPS}\n"
    f"head_size: {SIZE}\nhf_config:\n  org: meta-llama\n  name: tiny\nmlp_class_name: LLaMAMLP\n"
)


def hyperparameters(sides: str) -> str:
    flags = "".join(f"{flag}: {str(side in sides).lower()}\n" for side, flag in FLAGS.items())
    return (
        f"checkpoint_dir: checkpoints/meta-llama/tiny\ndata:\n  class_path: litgpt.data.Alpaca\n"
        f"lora_alpha: {ALPHA}\nlora_dropout: 0.05\nlora_r: {RANK}  # the rank\n{flags}"
        "train:\n  - 1\nprecision: 'bf16-true'\n"
    )


def write(
    folder: Path, sides: str, *, fused: str = "attn.qkv", is_told: bool = True
) -> dict[str, torch.Tensor]:
    """Write an adapter as litgpt does; return the deltas of the projections."""
    folder.mkdir()
    tensors, truth = {}, {}
    scale = ALPHA / RANK
    for layer in range(2):
        pairs = {side: (torch.randn(RANK, WIDTH), torch.randn(ROWS[side], RANK)) for side in sides}
        for side, (a, b) in pairs.items():
            name = f"model.layers.{layer}.self_attn.{side}_proj"
            truth[name] = scale * b.double() @ a.double()
        block = f"transformer.h.{layer}"
        tensors[f"{block}.{fused}.lora_A"] = torch.cat([a for a, _ in pairs.values()])
        tensors[f"{block}.{fused}.lora_B"] = torch.cat([b for _, b in pairs.values()])
        for own, (hub, out, into) in LAYERS.items():
            a, b = torch.randn(RANK, into), torch.randn(out, RANK)
            tensors |= {f"{block}.{own}.lora_A": a, f"{block}.{own}.lora_B": b}
            truth[f"model.layers.{layer}.{hub}"] = scale * b.double() @ a.double()
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    if is_told:
        (folder / "hyperparameters.yaml").write_text(hyperparameters(sides))
        (folder / "model_config.yaml").write_text(MODEL)
    return truth


@pytest.mark.parametrize("fused", ["attn.qkv", "attn.attn"])
@pytest.mark.parametrize("sides", ["q", "v", "qv", "kv", "qkv"])
def test_to_peft(sides: str, fused: str, tmp_path: Path) -> None:
    truth = write(tmp_path / "lit", sides, fused=fused)
    if (sides, fused) == ("qkv", "attn.attn"):
        with pytest.raises(UnsupportedError, match="older layout"):
            loratool.convert(tmp_path / "lit", "peft", tmp_path / "peft")
        return
    loratool.convert(tmp_path / "lit", "peft", tmp_path / "peft")
    assert relative_error(dense_deltas(tmp_path / "peft"), truth) < 1e-6


@pytest.mark.parametrize("sides", ["q", "qv", "kv", "qkv"])
def test_written_again_it_is_what_it_was(sides: str, tmp_path: Path) -> None:
    write(tmp_path / "lit", sides)
    loratool.convert(tmp_path / "lit", "peft", tmp_path / "peft")
    report = loratool.convert(tmp_path / "peft", "litgpt", tmp_path / "again")
    assert report.relative_error < 1e-7
    one = torch.load(tmp_path / "lit" / "lit_model.pth.lora", weights_only=True)["model"]
    other = torch.load(tmp_path / "again" / "lit_model.pth.lora", weights_only=True)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    said = read_flat_yaml(tmp_path / "again" / "hyperparameters.yaml")
    assert (said["lora_r"], said["lora_alpha"]) == (RANK, ALPHA)
    assert {side for side, flag in FLAGS.items() if said[flag]} == set(sides)
    assert said["lora_projection"] and said["lora_mlp"] and not said["lora_head"]


def test_layers_that_adapt_fewer_get_zeros(tmp_path: Path) -> None:
    tensors = {}
    for name, out in (
        ("0.self_attn.q_proj", 16),
        ("0.self_attn.v_proj", 8),
        ("1.self_attn.k_proj", 8),
    ):
        tensors[f"model.layers.{name}.lora_A.weight"] = torch.randn(2, 12)
        tensors[f"model.layers.{name}.lora_B.weight"] = torch.randn(out, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match="how many rows"):
        loratool.convert(tmp_path / "a.safetensors", "litgpt", tmp_path / "out")
    base = tmp_path / "base"
    base.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "head_dim": 4}
    (base / "config.json").write_text(json.dumps(config))
    loratool.convert(tmp_path / "a.safetensors", "litgpt", tmp_path / "out", base=base)
    loratool.convert(tmp_path / "out", "peft", tmp_path / "peft", base=base)
    found = dense_deltas(tmp_path / "peft")
    for name in tensors:
        if name.endswith("lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            up, down = tensors[f"{module}.lora_B.weight"], tensors[name]
            torch.testing.assert_close(found.pop(module), up.double() @ down.double())
    assert len(found) == 3 and not any(delta.any() for delta in found.values())


def test_without_what_lies_beside_nothing_is_guessed(tmp_path: Path) -> None:
    write(tmp_path / "lit", "qv", is_told=False)
    with pytest.raises(LoratoolError, match=r"hyperparameters\.yaml"):
        loratool.convert(tmp_path / "lit", "peft", tmp_path / "peft")


def test_other_kinds_of_model_are_named(tmp_path: Path) -> None:
    write(tmp_path / "lit", "qkv")
    (tmp_path / "lit" / "model_config.yaml").write_text(MODEL.replace("LLaMAMLP", "GptNeoxMLP"))
    with pytest.raises(LoratoolError, match="GptNeoxMLP"):
        loratool.convert(tmp_path / "lit", "peft", tmp_path / "peft")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 1\nb: -2.5e3\nc: true\nd:\ne: 'x: y' # z\n", {"a": 1, "b": -2500.0, "c": True}),
        ("---\n# all\nlong: |\n  a: 3\nlist:\n- x\n- y\nb: 5\n...\n", {"long": None, "b": 5}),
        ("x: !!python/object:os.system ls\ny: *z\n", {"x": None, "y": None}),
        ('{"lora_r": 8, "x": [1]}', {"lora_r": 8}),
        ('k: "tab\\t"\n"quoted": no\n', {"k": None, "quoted": False}),
    ],
)
def test_flat_yaml(text: str, found: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    said = read_flat_yaml(tmp_path / "x.yaml")
    assert found.items() <= said.items()


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "only words\n", "\x00: 1\n", "? x\n: y\n"])
def test_what_is_no_flat_yaml_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(FileFormatError):
        read_flat_yaml(tmp_path / "x.yaml")
