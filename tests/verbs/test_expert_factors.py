"""Factors of one expert's share of a stacked parameter: in lists, by number, and stacked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import torch
from deltas import dense_deltas
from safetensors.torch import load_file

import loratool

Make = Callable[..., Path]
EXPERTS: Final = 3
SHAPES: Final = {"gate_up_proj": (24, 16), "down_proj": (16, 12)}
CONTAINER: Final = "model.layers.0.mlp.experts"
FORMS: Final = {
    "lists": "{name}s.{expert}",
    "numbers": "{expert}.{name}",
    "stacks": "",
}


def write(make_adapter: Make, form: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write an adapter; return the deltas of the parameters, ``(experts, out, in)``."""
    tensors, truth = {}, {}
    for name, (out, into) in SHAPES.items():
        a, b = torch.randn(EXPERTS, 2, into), torch.randn(EXPERTS, out, 2)
        truth[name] = 3 * b.double() @ a.double()
        if form == "stacks":
            tensors[f"{CONTAINER}.{name}.lora_A.weight"] = a
            tensors[f"{CONTAINER}.{name}.lora_B.weight"] = b
            continue
        for expert in range(EXPERTS):
            module = f"{CONTAINER}.{FORMS[form].format(name=name, expert=expert)}"
            tensors[f"{module}.lora_A.weight"] = a[expert]
            tensors[f"{module}.lora_B.weight"] = b[expert]
    return make_adapter(tensors, r=2, lora_alpha=6), truth


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_turned", [True, False], ids=["gpt-oss", "as PEFT has them"])
def test_merged(
    form: str, is_turned: bool, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    adapter, truth = write(make_adapter, form)
    weights = {}
    for name, (out, into) in SHAPES.items():
        sides = (into, out) if is_turned else (out, into)
        weights[f"{CONTAINER}.{name}"] = torch.randn(EXPERTS, *sides)
    config = {"model_type": "gpt_oss"} if is_turned else {"model_type": "qwen3_moe"}
    base = make_base(weights, config)
    loratool.merge(base, [adapter], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, delta in truth.items():
        key = f"{CONTAINER}.{name}"
        wanted = weights[key].double() + (delta.mT if is_turned else delta)
        torch.testing.assert_close(merged[key].double(), wanted, rtol=1e-6, atol=1e-5)


def test_a_stack_is_one_module_for_each_expert(make_adapter: Make, tmp_path: Path) -> None:
    adapter, truth = write(make_adapter, "stacks")
    loratool.convert(adapter, "peft", tmp_path / "out")
    found = dense_deltas(tmp_path / "out")
    assert len(found) == 2 * EXPERTS
    for name, delta in truth.items():
        for expert in range(EXPERTS):
            torch.testing.assert_close(found[f"{CONTAINER}.{expert}.{name}"], delta[expert])
