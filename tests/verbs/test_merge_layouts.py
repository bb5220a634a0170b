"""Layouts that shapes alone do not settle, and the formulas of those that they do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import read_all
from samples import lora

import loratool
from loratool.errors import (
    AdapterError,
    BaseModelError,
    LoratoolError,
    MergeError,
    UnsupportedError,
)

Make = Callable[..., Path]
EXPERTS, RANK = 3, 2


def fused_factors(module: str, out: int, into: int, rank: int = RANK) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_A.weight": torch.randn(EXPERTS * rank, into),
        f"{module}.lora_B.weight": torch.randn(out, EXPERTS * rank),
    }


def fused_delta(factors: dict[str, torch.Tensor], module: str, scale: float = 1.0) -> torch.Tensor:
    """Return ``(E, out, in)`` as PEFT defines it: A by expert, B interleaved."""
    down = factors[f"{module}.lora_A.weight"].double()
    up = factors[f"{module}.lora_B.weight"].double()
    downs = down.reshape(EXPERTS, -1, down.shape[1])
    ups = up.reshape(up.shape[0], -1, EXPERTS)
    return scale * torch.einsum("ore,eri->eoi", ups, downs)


def merged(base: Path, adapter: Path, tmp_path: Path, **options: Any) -> dict[str, torch.Tensor]:
    loratool.merge(base, [adapter], tmp_path / "out", **options)
    return {key: value.double() for key, value in read_all(tmp_path / "out").items()}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


CONFIG = {"r": RANK, "lora_alpha": RANK, "target_modules": []}


@pytest.mark.parametrize(
    ("version", "model_type", "transposed"),
    [
        ("0.18.1", "qwen3_moe", True),
        (None, "qwen3_moe", True),
        ("0.19.1", "qwen3_moe", False),
        ("0.21.2", "gpt_oss", True),
        ("0.19.0", "qwen3_moe", None),
        ("0.21.2", None, None),
    ],
)
def test_square_experts_are_settled_by_release_and_model(
    version: str | None,
    model_type: str | None,
    transposed: bool | None,
    make_base: Make,
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    weight = torch.randn(EXPERTS, 6, 6)
    base = make_base(
        {"mlp.experts.down_proj": weight}, {"model_type": model_type} if model_type else None
    )
    factors = fused_factors("mlp.experts", 6, 6)
    adapter = make_adapter(
        factors, target_parameters=["experts.down_proj"], peft_version=version, **CONFIG
    )
    if transposed is None:
        with pytest.raises(BaseModelError, match="square"):
            loratool.merge(base, [adapter], tmp_path / "out")
        return
    delta = fused_delta(factors, "mlp.experts")
    expected = weight.double() + (delta.mT if transposed else delta)
    assert_close(merged(base, adapter, tmp_path)["mlp.experts.down_proj"], expected)


def test_nested_parameters_of_equal_shape_follow_their_registration(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    weights = {
        "mlp.experts.gate_up_proj": torch.randn(EXPERTS, 8, 6),
        "mlp.experts.down_proj": torch.randn(EXPERTS, 6, 8),
    }
    base = make_base(weights, {"model_type": "qwen3_moe"})
    inner = fused_factors("mlp.experts.base_layer", 8, 6)
    outer = fused_factors("mlp.experts", 6, 8)
    adapter = make_adapter(
        inner | outer,
        target_parameters=["experts.down_proj", "experts.gate_up_proj"],
        peft_version="0.21.2",
        **CONFIG,
    )
    result = merged(base, adapter, tmp_path)
    for key, factors, module in (
        ("mlp.experts.gate_up_proj", inner, "mlp.experts.base_layer"),
        ("mlp.experts.down_proj", outer, "mlp.experts"),
    ):
        assert_close(result[key], weights[key].double() + fused_delta(factors, module))


def test_parameters_that_nothing_tells_apart_are_refused(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base(
        {"m.first": torch.randn(EXPERTS, 8, 6), "m.second": torch.randn(EXPERTS, 8, 6)}
    )
    adapter = make_adapter(
        fused_factors("m.base_layer", 8, 6) | fused_factors("m", 8, 6),
        target_parameters=["m.first", "m.second"],
        **CONFIG,
    )
    with pytest.raises(BaseModelError, match="assignment"):
        loratool.merge(base, [adapter], tmp_path / "out")


def test_flat_parameters_are_ordinary_deltas(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    weight = torch.randn(7, 5)
    base = make_base({"m.q_proj.weight": weight})
    factors = lora("m.q_proj", 7, 5, RANK)
    adapter = make_adapter(
        factors,
        r=RANK,
        lora_alpha=8,
        target_parameters=["q_proj.weight"],
        alpha_pattern={"q_proj.weight": 6},
    )
    delta = 3 * factors["m.q_proj.lora_B.weight"] @ factors["m.q_proj.lora_A.weight"]
    assert_close(merged(base, adapter, tmp_path)["m.q_proj.weight"], (weight + delta).double())


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_one_by_one_on_a_fused_base(
    transposed: bool, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    weight = torch.randn(EXPERTS, 6, 8) if transposed else torch.randn(EXPERTS, 8, 6)
    base = make_base({"mlp.experts.gate_up_proj": weight}, {"model_type": "aria"})
    factors = lora("mlp.experts.1.gate_proj", 4, 6) | lora("mlp.experts.2.up_proj", 4, 6)
    expected = (weight.mT if transposed else weight).double().clone()
    for expert, name, rows in ((1, "gate_proj", slice(0, 4)), (2, "up_proj", slice(4, 8))):
        module = f"mlp.experts.{expert}.{name}"
        up, down = factors[f"{module}.lora_B.weight"], factors[f"{module}.lora_A.weight"]
        expected[expert, rows] += 2 * up.double() @ down.double()
    result = merged(base, make_adapter(factors), tmp_path)["mlp.experts.gate_up_proj"]
    assert_close(result, expected.mT if transposed else expected)


def test_experts_that_do_not_fit_are_refused(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base(
        {"mlp.experts.gate_up_proj": torch.randn(EXPERTS, 8, 6)}, {"model_type": "gpt_oss"}
    )
    cases = {
        "interleaved": (lora("mlp.experts.1.gate_proj", 4, 6), UnsupportedError),
        "shape": (lora("mlp.experts.1.down_proj", 5, 6), BaseModelError),
        "count": (lora("mlp.experts.7.gate_proj", 4, 6), BaseModelError),
    }
    for name, (factors, error) in cases.items():
        with pytest.raises(error):
            loratool.merge(base, [make_adapter(factors, name=name)], tmp_path / "out")


def test_loralib_convolutions_fold_the_kernel_into_both_factors(
    make_base: Make, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    weight = torch.randn(6, 4, 3, 3)
    base = make_base({"c.weight": weight})
    factors = {"c.lora_A": torch.randn(2 * 3, 4 * 3), "c.lora_B": torch.randn(6 * 3, 2 * 3)}
    save_file(factors, tmp_path / "lora.safetensors")
    delta = (factors["c.lora_B"] @ factors["c.lora_A"]).view(weight.shape) * (4 / 2)
    result = merged(base, tmp_path / "lora.safetensors", tmp_path, alpha=4)
    assert_close(result["c.weight"], (weight + delta).double())


def test_flat_factors_on_a_pointwise_convolution(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    weight = torch.randn(6, 4, 1, 1)
    factors = lora("c", 6, 4)
    base = make_base({"c.weight": weight})
    delta = 2 * (factors["c.lora_B.weight"] @ factors["c.lora_A.weight"]).view(weight.shape)
    assert_close(
        merged(base, make_adapter(factors), tmp_path)["c.weight"], (weight + delta).double()
    )


def test_convolution_factors_on_a_linear_weight(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    weight = torch.randn(6, 4)
    factors = {
        "c.lora_A.weight": torch.randn(4, 4, 1, 1),
        "c.lora_B.weight": torch.randn(6, 4, 1, 1),
    }
    base = make_base({"c.weight": weight})
    delta = 2 * factors["c.lora_B.weight"].flatten(1) @ factors["c.lora_A.weight"].flatten(1)
    assert_close(
        merged(base, make_adapter(factors), tmp_path)["c.weight"], (weight + delta).double()
    )


def test_alpha_tensors_beside_the_factors_count(make_base: Make, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for index, alpha in enumerate(
        (
            torch.tensor(2.0),
            torch.tensor([2.0]).half(),
            torch.tensor(2),
            torch.tensor(2.0).bfloat16(),
        )
    ):
        weight = torch.randn(6, 5)
        base = make_base({"a.q.weight": weight}, name=f"base{index}")
        factors = lora("a.q", 6, 5)
        file = tmp_path / f"x{index}.safetensors"
        save_file(factors | {"a.q.alpha": alpha}, file)
        delta = 0.5 * factors["a.q.lora_B.weight"] @ factors["a.q.lora_A.weight"]
        loratool.merge(base, [file], tmp_path / f"out{index}")
        result = read_all(tmp_path / f"out{index}")["a.q.weight"]
        assert_close(result.double(), (weight + delta).double())
    save_file(factors | {"a.q.alpha": torch.ones(3)}, file)
    with pytest.raises(AdapterError, match="one number"):
        loratool.merge(base, [file], tmp_path / "out")


def test_adapters_that_meet_on_one_weight(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    """LoRA, DoRA and another LoRA in turn: DoRA's factor comes from the original weight."""
    weight = torch.randn(6, 5)
    base = make_base({"a.q.weight": weight})
    parts = [lora("a.q", 6, 5) for _ in range(3)]
    magnitude = torch.rand(6) + 0.5
    parts[1]["a.q.lora_magnitude_vector"] = magnitude
    adapters = [make_adapter(part, name=f"a{i}", use_dora=i == 1) for i, part in enumerate(parts)]
    deltas = [
        2 * part["a.q.lora_B.weight"].double() @ part["a.q.lora_A.weight"].double()
        for part in parts
    ]
    original = weight.double()
    factor = magnitude.double() / (original + deltas[1]).norm(dim=1)
    expected = factor[:, None] * (original + deltas[0] + deltas[1]) + deltas[2]
    loratool.merge(base, adapters, tmp_path / "out")
    assert_close(read_all(tmp_path / "out")["a.q.weight"].double(), expected)


def test_layer_replication_needs_a_stack_that_has_the_layers(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base(
        {"model.layers.0.q.weight": torch.randn(6, 5), "model.norm.weight": torch.ones(5)}
    )
    for value in ([[0, 2]], [[0]], "x", [[0, 100_000]], [[1, 1]]):
        adapter = make_adapter(
            lora("model.layers.0.q", 6, 5), name=f"a{value}", layer_replication=value
        )
        with pytest.raises(LoratoolError):
            loratool.merge(base, [adapter], tmp_path / "out")
    two = make_adapter(
        lora("model.layers.1.q", 6, 5), name="two", layer_replication=[[0, 1], [0, 1]]
    )
    one = make_adapter(lora("model.layers.0.q", 6, 5), name="one")
    with pytest.raises(MergeError, match="disagree"):
        loratool.merge(base, [one, two], tmp_path / "out")


def test_devices_that_are_not_there(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"a.q.weight": torch.randn(6, 5)})
    adapter = make_adapter(lora("a.q", 6, 5))
    loratool.merge(base, [adapter], tmp_path / "cpu", device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="cuda"):
            loratool.merge(base, [adapter], tmp_path / "out", device="cuda")
