"""Adapters with the names of the live model merge into files that are cut and ordered otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from samples import lora

import loratool
from loratool.errors import UnsupportedError

Make = Callable[..., Path]
HEADS = 2
KIMI = {
    "model_type": "kimi_k25",
    "architectures": ["Kimi_K25ForConditionalGeneration"],
    "vision_config": {"num_attention_heads": HEADS},
}
WHOLE = "vision_tower.encoder.blocks.0.wqkv.weight"
LIVE = "model.vision_tower.layers.0.attn"


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


def delta(factors: dict[str, torch.Tensor], module: str, rank: int = 4) -> torch.Tensor:
    """Return the delta of a module in float64; the adapters here have twice the rank as alpha."""
    down, up = (factors[f"{module}.lora_{x}.weight"].double() for x in "AB")
    return 8 / rank * up @ down


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    loratool.merge(base, [adapter], output=base.parent / "out")
    return load_file(base.parent / "out" / "model.safetensors")


def test_a_single_expert_keeps_gate_and_up_apart(make_base: Make, make_adapter: Make) -> None:
    path = "model.layers.0.mlp.experts"
    base = {
        f"{path}.0.gate_proj.weight": torch.randn(6, 10),
        f"{path}.0.up_proj.weight": torch.randn(6, 10),
        f"{path}.0.down_proj.weight": torch.randn(10, 6),
    }
    config = {"model_type": "hunyuan_v1_moe", "architectures": ["HunYuanMoEV1ForCausalLM"]}
    factors = {
        f"{path}.base_layer.lora_A.weight": torch.randn(4, 10),
        f"{path}.base_layer.lora_B.weight": torch.randn(12, 4),
        f"{path}.lora_A.weight": torch.randn(4, 6),
        f"{path}.lora_B.weight": torch.randn(10, 4),
    }
    targets = [f"{path}.gate_up_proj", f"{path}.down_proj"]
    adapter = make_adapter(
        factors, target_parameters=targets, target_modules=[], peft_version="0.21.2"
    )
    after = merged(make_base(base, config=config), adapter)
    gate_up, down = delta(factors, f"{path}.base_layer"), delta(factors, path)
    truth = {"gate_proj": gate_up[:6], "up_proj": gate_up[6:], "down_proj": down}
    for leaf, change in truth.items():
        name = f"{path}.0.{leaf}.weight"
        assert_close(after[name].double(), base[name].double() + change)


def test_rows_in_halves_go_where_the_files_have_them_in_pairs(
    make_base: Make, make_adapter: Make
) -> None:
    base = {WHOLE: torch.randn(24, 8), "language_model.lm_head.weight": torch.randn(5, 8)}
    factors: dict[str, Any] = {}
    for part in ("q_proj", "k_proj", "v_proj"):
        factors |= lora(f"{LIVE}.{part}", 8, 8)
    after = merged(make_base(base, config=KIMI), make_adapter(factors, target_modules=["q_proj"]))
    truth = []
    for part in ("q_proj", "k_proj", "v_proj"):
        change = delta(factors, f"{LIVE}.{part}")
        if part != "v_proj":  # of a head, row 0 of each half, then row 1 of each half
            change = change.reshape(HEADS, 2, 2, 8).transpose(1, 2).reshape(8, 8)
        truth.append(change)
    expected = base[WHOLE].double() + torch.cat(truth)
    assert_close(after[WHOLE].double(), expected)


@pytest.mark.parametrize("kind", ["ia3", "bias"])
def test_what_is_no_delta_by_outputs_is_refused_where_rows_are_mixed(
    kind: str, make_base: Make, make_adapter: Make
) -> None:
    module = f"{LIVE}.k_proj"
    factors: dict[str, Any] = {f"{module}.ia3_l": torch.rand(8, 1)}
    settings: dict[str, Any] = {"peft_type": "IA3", "feedforward_modules": []}
    if kind == "bias":
        factors = lora(module, 8, 8) | {f"{module}.lora_B.bias": torch.rand(8)}
        settings = {"lora_bias": True}
    adapter = make_adapter(factors, target_modules=["k_proj"], **settings)
    base = make_base({WHOLE: torch.randn(24, 8)}, config=KIMI)
    with pytest.raises(UnsupportedError, match="in another order") as refused:
        loratool.merge(base, [adapter], output=base.parent / "out")
    assert "--to-lora --base BASE --rank R" in str(refused.value.hint)
    assert not (base.parent / "out").exists()


@pytest.mark.parametrize("is_plain", [False, True])
def test_magnitudes_lie_as_rows_do(is_plain: bool, make_base: Make, make_adapter: Make) -> None:
    """A DoRA is merged as it is, or made a plain one first."""
    module = f"{LIVE}.k_proj"
    factors = lora(module, 8, 8) | {f"{module}.lora_magnitude_vector": torch.rand(8) + 1}
    adapter = make_adapter(factors, target_modules=["k_proj"], use_dora=True)
    whole = torch.randn(24, 8)
    base = make_base({WHOLE: whole}, config=KIMI)
    if is_plain:
        plain = base.parent / "plain"
        loratool.convert(adapter, "peft", plain, base=base, to_lora=True, rank=8)
        adapter = plain
    after = merged(base, adapter)[WHOLE].double()
    keys = whole[8:16].double().reshape(HEADS, 2, 2, 8).transpose(1, 2).reshape(8, 8)
    grown = keys + delta(factors, module)
    magnitude = factors[f"{module}.lora_magnitude_vector"].double()
    truth = magnitude[:, None] * grown / grown.norm(dim=1, keepdim=True)
    paired = truth.reshape(HEADS, 2, 2, 8).transpose(1, 2).reshape(8, 8)
    assert_close(after, torch.cat([whole[:8].double(), paired, whole[16:].double()]))


def test_q_k_and_v_of_unequal_rows_merge_into_one(make_base: Make, make_adapter: Make) -> None:
    path = "model.layers.0.self_attn"
    config = {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "hidden_size": 8,
    }
    base = {f"{path}.qkv_proj.weight": torch.randn(12, 8), "lm_head.weight": torch.randn(3, 8)}
    factors: dict[str, Any] = {}
    for part, rows in (("q_proj", 8), ("v_proj", 2)):
        factors |= lora(f"{path}.{part}", rows, 8)
    adapter = make_adapter(factors, target_modules=["q_proj", "v_proj"])
    after = merged(make_base(base, config=config), adapter)[f"{path}.qkv_proj.weight"].double()
    expected = base[f"{path}.qkv_proj.weight"].double()
    expected[:8] += delta(factors, f"{path}.q_proj")
    expected[10:] += delta(factors, f"{path}.v_proj")
    assert_close(after, expected)


def test_gate_and_up_in_one_merge_into_a_model_that_has_them_apart(
    make_base: Make, make_adapter: Make
) -> None:
    path = "model.layers.0.mlp"
    base = {f"{path}.{leaf}.weight": torch.randn(6, 8) for leaf in ("gate_proj", "up_proj")}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    factors = lora(f"{path}.gate_up_proj", 12, 8)
    adapter = make_adapter(factors, target_modules=["gate_up_proj"])
    after = merged(make_base(base, config=config), adapter)
    changes = delta(factors, f"{path}.gate_up_proj").chunk(2)
    for leaf, change in zip(("gate_proj", "up_proj"), changes, strict=True):
        name = f"{path}.{leaf}.weight"
        assert_close(after[name].double(), base[name].double() + change)
