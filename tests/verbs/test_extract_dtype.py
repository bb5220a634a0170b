"""Without ``--dtype`` an extracted adapter keeps the digits of both models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratool

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
WIDER = {
    frozenset({"F64", "F32"}): "F64",
    frozenset({"F64", "F16"}): "F64",
    frozenset({"F64", "BF16"}): "F64",
    frozenset({"F32", "F16"}): "F32",
    frozenset({"F32", "BF16"}): "F32",
    frozenset({"F16", "BF16"}): "F32",
}


@pytest.mark.parametrize("to", ["peft", "module-path", "kohya"])
@pytest.mark.parametrize("tuned", DTYPES)
@pytest.mark.parametrize("base", DTYPES)
def test_the_wider_dtype_is_written(
    base: str, tuned: str, to: str, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.q_proj"
    weight = torch.randn(12, 8, dtype=torch.float64)
    change = torch.randn(12, 8, dtype=torch.float64)
    before = weight.to(DTYPES[base])
    after = (weight + change).to(DTYPES[tuned])
    config = {"model_type": "llama"}
    one = make_base({f"{name}.weight": before}, config, name="one")
    two = make_base({f"{name}.weight": after}, config, name="two")
    out = tmp_path / ("out.safetensors" if to == "kohya" else "out")
    report = loratool.extract(one, two, out, rank=8, to=to)
    weights = out if out.is_file() else out / "adapter_model.safetensors"
    found = load_file(weights)
    wanted = DTYPES[WIDER.get(frozenset({base, tuned}), base)]
    factors = {key: value for key, value in found.items() if not key.endswith("alpha")}
    assert {value.dtype for value in factors.values()} == {wanted}
    (down,) = (v for k, v in factors.items() if "lora_A" in k or "lora_down" in k)
    (up,) = (v for k, v in factors.items() if "lora_B" in k or "lora_up" in k)
    truth = after.double() - before.double()
    error = (up.double() @ down.double() - truth).norm() / truth.norm()
    assert error < 4 * max(torch.finfo(wanted).eps, torch.finfo(torch.float32).eps)
    assert report.relative_error < 4 * max(torch.finfo(wanted).eps, torch.finfo(torch.float32).eps)


def test_an_asked_dtype_wins(make_base: Callable[..., Path], tmp_path: Path) -> None:
    one = make_base({"a.q.weight": torch.randn(6, 5)}, name="one")
    two = make_base({"a.q.weight": torch.randn(6, 5).bfloat16()}, name="two")
    loratool.extract(one, two, tmp_path / "out", rank=5, dtype="float16")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.float16}
