"""Merges whose truth is a float64 formula: where PEFT is wrong or cannot load the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import FIXTURES, read_all
from safetensors.torch import load_file, save_file
from samples import lora

import loratool

Make = Callable[..., Path]


def merged_case(name: str, base: str, tmp_path: Path, **options: Any) -> tuple[Any, Any, Any]:
    """Return base tensors, adapter tensors and merged tensors of a fixture, in float64."""
    adapter = FIXTURES / "adapters" / name
    loratool.merge(
        FIXTURES / "bases" / base, [adapter], tmp_path / "out", dtype="float32", **options
    )
    file = next(adapter.glob("adapter_model.*"))
    raw = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    factors = {key.removeprefix("base_model.model."): value.double() for key, value in raw.items()}
    before = {key: value.double() for key, value in read_all(FIXTURES / "bases" / base).items()}
    after = {key: value.double() for key, value in read_all(tmp_path / "out").items()}
    return before, factors, after


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("doubled-prefix", None),
        ("module-path", None),
        ("module-path-without-config", 4.0),
        ("loralib", 4.0),
        ("loralib-pickled", 4.0),
    ],
)
def test_other_names_same_delta(name: str, scale: float | None, tmp_path: Path) -> None:
    before, factors, after = merged_case(name, "llama-untied", tmp_path, alpha=scale)
    factors = {
        key.removeprefix("base_model.model.").removesuffix(".weight"): value
        for key, value in factors.items()
    }
    modules = {key.removesuffix(".lora_A") for key in factors if key.endswith(".lora_A")}
    config = loratool.open_adapter(FIXTURES / "adapters" / name).config
    assert modules
    for key, weight in before.items():
        module = key.removesuffix(".weight")
        if module in modules:
            down, up = factors[f"{module}.lora_A"], factors[f"{module}.lora_B"]
            alpha = scale if config is None else config.alpha
            assert alpha is not None
            weight = weight + alpha / down.shape[0] * up @ down
        assert_close(after[key], weight)


def test_missing_alpha_means_scale_one_and_is_said(tmp_path: Path) -> None:
    adapter = FIXTURES / "adapters" / "loralib"
    report = loratool.merge(
        FIXTURES / "bases" / "llama-untied", [adapter], tmp_path / "out", dtype="float32"
    )
    assert any("scale is taken as 1" in note for note in report.notes)
    before, after = read_all(FIXTURES / "bases" / "llama-untied"), read_all(tmp_path / "out")
    factors = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in factors if key.endswith(".lora_A"))
    module = key.removesuffix(".lora_A")
    delta = factors[f"{module}.lora_B"].double() @ factors[key].double()
    assert_close(after[f"{module}.weight"].double(), before[f"{module}.weight"].double() + delta)


def test_per_expert_rslora_scales_each_expert_by_its_own_rank(tmp_path: Path) -> None:
    before, factors, after = merged_case("experts-per-expert-rslora", "mixtral", tmp_path)
    config = loratool.open_adapter(FIXTURES / "adapters" / "experts-per-expert-rslora").config
    assert config is not None
    modules = [key.removesuffix(".lora_A.weight") for key in factors if "lora_A" in key]
    assert any(".experts.1.w3" in module for module in modules)
    for module in modules:
        down, up = factors[f"{module}.lora_A.weight"], factors[f"{module}.lora_B.weight"]
        expected = before[f"{module}.weight"] + config.alpha / math.sqrt(down.shape[0]) * up @ down
        assert_close(after[f"{module}.weight"], expected)


def test_per_expert_adapter_on_a_fused_base(tmp_path: Path) -> None:
    before, factors, after = merged_case("experts-per-expert-fused-base", "granite-moe", tmp_path)
    config = loratool.open_adapter(FIXTURES / "adapters" / "experts-per-expert-fused-base").config
    assert config is not None
    expected = {key: value.clone() for key, value in before.items()}
    for key in factors:
        if "lora_A" not in key:
            continue
        module = key.removesuffix(".lora_A.weight")
        *_, expert, leaf = module.split(".")
        down, up = factors[key], factors[f"{module}.lora_B.weight"]
        delta = config.alpha / down.shape[0] * up @ down
        block = "model.layers.0.block_sparse_moe."
        if leaf in ("down_proj", "w2"):
            expected[f"{block}output_linear.weight"][int(expert)] += delta
        else:
            half = 0 if leaf in ("gate_proj", "w1") else delta.shape[0]
            expected[f"{block}input_linear.weight"][int(expert), half : half + len(delta)] += delta
    for key, value in expected.items():
        assert_close(after[key], value)


def test_old_expert_layout_is_told_by_its_shapes(tmp_path: Path) -> None:
    before, factors, after = merged_case("experts-mixtral-old-layout", "mixtral", tmp_path)
    config = loratool.open_adapter(FIXTURES / "adapters" / "experts-mixtral-old-layout").config
    assert config is not None
    checked = 0
    for key, down in factors.items():
        if "lora_A" not in key:
            continue
        module = key.removesuffix(".lora_A.weight")
        up = factors[f"{module}.lora_B.weight"]
        layer = module.split(".mlp.")[0]
        experts = 2
        rank = down.shape[0] // experts
        downs = down.reshape(experts, rank, -1)
        ups = up.reshape(up.shape[0], rank, experts)
        for expert in range(experts):
            delta = (config.alpha / rank * ups[:, :, expert] @ downs[expert]).T
            disk = f"{layer}.block_sparse_moe.experts.{expert}"
            if delta.shape == before[f"{disk}.w2.weight"].shape:
                names = [(f"{disk}.w2.weight", delta)]
            else:
                gate, up_part = delta.chunk(2)
                names = [(f"{disk}.w1.weight", gate), (f"{disk}.w3.weight", up_part)]
            for name, part in names:
                assert_close(after[name], before[name] + part)
                checked += 1
    assert checked


def test_biases_under_their_old_names_replace_the_base_s(tmp_path: Path) -> None:
    before, factors, after = merged_case("bias-old-names", "qwen2", tmp_path)
    biases = [key for key in factors if key.endswith(".bias")]
    assert biases
    for key in biases:
        assert torch.equal(after[key], factors[key])
        assert not torch.equal(after[key], before[key])


def test_qalora_spreads_a_over_its_groups(tmp_path: Path) -> None:
    before, factors, after = merged_case("qalora", "llama-untied", tmp_path)
    config = loratool.open_adapter(FIXTURES / "adapters" / "qalora").config
    assert config is not None
    module = "model.layers.0.self_attn.v_proj"
    down, up = factors[f"{module}.lora_A.weight"], factors[f"{module}.lora_B.weight"]
    weight = before[f"{module}.weight"]
    inputs = torch.randn(5, weight.shape[1], dtype=torch.float64)
    groups = down.shape[1]
    pooled = inputs.view(5, groups, -1).mean(2) * groups
    expected = inputs @ weight.T + config.alpha / config.rank * pooled @ down.T @ up.T
    assert_close(inputs @ after[f"{module}.weight"].T, expected)


def test_clip_text_names_of_transformers_4(tmp_path: Path) -> None:
    before, factors, after = merged_case("clip-text-old-names", "clip-text", tmp_path)
    config = loratool.open_adapter(FIXTURES / "adapters" / "clip-text-old-names").config
    assert config is not None
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) == sum("lora_A" in key for key in factors)
    for key in changed:
        module = key.removesuffix(".weight")
        down, up = factors[f"{module}.lora_A.weight"], factors[f"{module}.lora_B.weight"]
        assert_close(after[key], before[key] + config.alpha / down.shape[0] * up @ down)


def round_to_bfloat16(value: torch.Tensor) -> torch.Tensor:
    """Round float64 to the nearest bfloat16, ties to even, in one step."""
    mantissa, exponent = torch.frexp(value)
    scaled = torch.ldexp(mantissa, torch.tensor(8))
    return torch.ldexp(torch.round(scaled), exponent - 8).float().bfloat16()


def test_one_rounding_is_bit_exact_in_bfloat16(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    weight = (0.02 * torch.randn(512, 768)).bfloat16()
    factors = lora("q", 512, 768, 16)
    factors = {key: 0.02 * value for key, value in factors.items()}
    base = make_base({"q.weight": weight})
    adapter = make_adapter(factors, r=16, lora_alpha=32)
    loratool.merge(base, [adapter], tmp_path / "out")
    down, up = factors["q.lora_A.weight"].double(), factors["q.lora_B.weight"].double()
    expected = round_to_bfloat16(weight.double() + 2 * up @ down)
    equal = (read_all(tmp_path / "out")["q.weight"] == expected).double().mean()
    assert equal >= 0.999


def test_several_adapters_are_rounded_once(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    weight = (0.02 * torch.randn(256, 256)).bfloat16()
    base = make_base({"q.weight": weight})
    expected = weight.double()
    adapters = []
    weights = [0.7, -0.2, 1.3]
    for index, scale in enumerate(weights):
        factors = {k: 0.02 * v for k, v in lora("q", 256, 256, 4 + index).items()}
        adapters.append(make_adapter(factors, name=f"a{index}", r=4 + index, lora_alpha=7))
        down, up = factors["q.lora_A.weight"].double(), factors["q.lora_B.weight"].double()
        expected = expected + scale * 7 / (4 + index) * up @ down
    loratool.merge(base, adapters, tmp_path / "out", weights=weights)
    equal = (read_all(tmp_path / "out")["q.weight"] == round_to_bfloat16(expected)).double().mean()
    assert equal >= 0.999


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 40),
    into=st.integers(1, 40),
    rank=st.integers(1, 9),
    alpha=st.floats(-20, 20).filter(lambda x: abs(x) > 1e-3),
    weight=st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3),
    rslora=st.booleans(),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 1000),
)
def test_merge_is_base_plus_weight_times_delta(
    tmp_path_factory: pytest.TempPathFactory,
    out: int,
    into: int,
    rank: int,
    alpha: float,
    weight: float,
    rslora: bool,
    dtype: str,
    seed: int,
) -> None:
    import json

    folder = tmp_path_factory.mktemp("law")
    torch.manual_seed(seed)
    original = torch.randn(out, into, dtype=getattr(torch, dtype))
    save_file({"m.w.weight": original}, folder / "base.safetensors")
    factors = lora("m.w", out, into, rank, dtype=torch.float64)
    save_file(
        {f"base_model.model.{k}": v for k, v in factors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": rslora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    loratool.merge(
        folder / "base.safetensors",
        [folder / "adapter_model.safetensors"],
        folder / "out.safetensors",
        weights=[weight],
    )
    scale = weight * alpha / (math.sqrt(rank) if rslora else rank)
    delta = scale * factors["m.w.lora_B.weight"] @ factors["m.w.lora_A.weight"]
    result = load_file(folder / "out.safetensors")["m.w.weight"]
    expected = original.double() + delta
    tolerance = 1e-6 if dtype == "float32" else 1e-14
    size = original.double().norm() + delta.norm()
    assert result.dtype == original.dtype
    assert (result.double() - expected).norm() <= tolerance * size


def test_large_tensors_are_computed_by_blocks(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    weight = torch.randn(1100, 700)  # more than two blocks, the last one shorter
    factors = lora("a.b", 1100, 700, 3)
    base = make_base({"a.b.weight": weight, "a.norm.weight": torch.ones(5)})
    adapter = make_adapter(factors, r=3, lora_alpha=5)
    loratool.merge(base, [adapter], tmp_path / "out", threads=3)
    delta = 5 / 3 * factors["a.b.lora_B.weight"].double() @ factors["a.b.lora_A.weight"].double()
    assert_close(read_all(tmp_path / "out")["a.b.weight"].double(), weight.double() + delta)


def test_dora_with_a_weight_moves_that_share_of_the_way(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    weight = torch.randn(12, 9)
    factors = lora("a.b", 12, 9) | {"a.b.lora_magnitude_vector": torch.rand(12) + 0.5}
    base = make_base({"a.b.weight": weight})
    adapter = make_adapter(factors, use_dora=True)
    loratool.merge(base, [adapter], tmp_path / "out", weights=[0.25])
    moved = weight.double() + 2 * (
        factors["a.b.lora_B.weight"].double() @ factors["a.b.lora_A.weight"].double()
    )
    full = moved * (factors["a.b.lora_magnitude_vector"].double() / moved.norm(dim=1))[:, None]
    expected = weight.double() + 0.25 * (full - weight.double())
    assert_close(read_all(tmp_path / "out")["a.b.weight"].double(), expected)
