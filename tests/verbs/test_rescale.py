"""``rescale``: exact through configurations, patterns, biases and alpha tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deltas import dense_deltas, load_config, load_tensors, relative_error
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.errors import LoratoolError, OptionError

Make = Callable[..., Path]
Q, V = "layers.0.q_proj", "layers.0.v_proj"


def patterned(make: Make, **config: Any) -> Path:
    return make(
        {**lora(Q, 12, 10), **lora(V, 6, 10, 3)},
        target_modules=[Q, V],
        rank_pattern={"v_proj": 3},
        alpha_pattern={"q_proj": 5},
        **config,
    )


def scaled(truth: dict[str, torch.Tensor], by: float) -> dict[str, torch.Tensor]:
    return {name: delta * by for name, delta in truth.items()}


@pytest.mark.parametrize("rslora", [False, True])
def test_scale_changes_alphas_and_no_tensor(
    make_adapter: Make, tmp_path: Path, rslora: bool
) -> None:
    adapter = patterned(make_adapter, use_rslora=rslora)
    report = loratool.rescale(adapter, tmp_path / "out", scale=-0.3)
    config = load_config(tmp_path / "out")
    assert config["lora_alpha"] == 8 * -0.3
    assert config["alpha_pattern"] == {"q_proj": 5 * -0.3}
    assert config["rank_pattern"] == {"v_proj": 3}
    before, after = load_tensors(adapter), load_tensors(tmp_path / "out")
    assert all(torch.equal(before[key], after[key]) for key in before)
    truth = scaled(dense_deltas(adapter), -0.3)
    assert relative_error(dense_deltas(tmp_path / "out"), truth) < 1e-15
    assert report.relative_error == 0


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("form", ["fold", "to_rslora", "from_rslora"])
def test_forms_leave_the_delta_alone(
    make_adapter: Make, tmp_path: Path, rslora: bool, form: str
) -> None:
    adapter = patterned(make_adapter, use_rslora=rslora)
    report = loratool.rescale(adapter, tmp_path / "out", **{form: True})
    truth = dense_deltas(adapter)
    limit = 1e-7 if form == "fold" else 1e-15
    assert relative_error(dense_deltas(tmp_path / "out"), truth) < limit
    config = load_config(tmp_path / "out")
    assert config["use_rslora"] == (form == "to_rslora")
    if form == "fold":
        assert config["lora_alpha"] == config["r"]
        assert config["alpha_pattern"] == config["rank_pattern"]
        error = relative_error(dense_deltas(tmp_path / "out"), truth)
        assert report.relative_error == pytest.approx(error, rel=1e-3)
    else:
        before, after = load_tensors(adapter), load_tensors(tmp_path / "out")
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_alpha_keeps_the_factors_or_the_delta(make_adapter: Make, tmp_path: Path) -> None:
    adapter = patterned(make_adapter)
    truth = dense_deltas(adapter)
    report = loratool.rescale(adapter, tmp_path / "factors", alpha=16)
    found = dense_deltas(tmp_path / "factors")
    assert torch.allclose(found[Q], truth[Q] * 16 / 5)
    assert torch.allclose(found[V], truth[V] * 2)
    assert any("factors are what they were" in note for note in report.notes)
    report = loratool.rescale(adapter, tmp_path / "delta", alpha=16, keep="delta")
    assert relative_error(dense_deltas(tmp_path / "delta"), truth) < 1e-7
    for name in ("factors", "delta"):
        config = load_config(tmp_path / name)
        assert (config["lora_alpha"], config["alpha_pattern"]) == (16, {})
    assert any("B makes up" in note for note in report.notes)


def test_norms_are_limited_module_by_module(make_adapter: Make, tmp_path: Path) -> None:
    adapter = patterned(make_adapter)
    truth = dense_deltas(adapter)
    norms = {name: float(delta.norm()) for name, delta in truth.items()}
    limit = (norms[Q] + norms[V]) / 2
    report = loratool.rescale(adapter, tmp_path / "out", max_norm=limit)
    for name, delta in dense_deltas(tmp_path / "out").items():
        assert float(delta.norm()) == pytest.approx(min(norms[name], limit), rel=1e-9)
    assert report.notes[0].startswith("1 of 2 modules")


def test_biases_beside_b_scale_along(make_adapter: Make, tmp_path: Path) -> None:
    bias = torch.randn(12)
    adapter = make_adapter(
        {**lora(Q, 12, 10), f"{Q}.lora_B.bias": bias}, target_modules=[Q], lora_bias=True
    )
    loratool.rescale(adapter, tmp_path / "out", scale=0.3, fold=True)
    found = load_tensors(tmp_path / "out")[f"base_model.model.{Q}.lora_B.bias"]
    assert torch.allclose(found, bias * 0.6)


def test_what_is_no_delta_stays_and_is_named(make_adapter: Make, tmp_path: Path) -> None:
    head = torch.randn(3, 4)
    adapter = make_adapter(
        {**lora(Q, 12, 10), "score.weight": head}, target_modules=[Q], modules_to_save=["score"]
    )
    report = loratool.rescale(adapter, tmp_path / "out", scale=0.5)
    assert torch.equal(load_tensors(tmp_path / "out")["base_model.model.score.weight"], head)
    assert any("score.weight" in note for note in report.notes)


def test_dora_takes_another_form_but_no_scale(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter(
        {**lora(Q, 12, 10), f"{Q}.lora_magnitude_vector": torch.rand(12)},
        target_modules=[Q],
        use_dora=True,
    )
    loratool.rescale(adapter, tmp_path / "out", fold=True)
    assert load_config(tmp_path / "out")["use_dora"] is True
    assert relative_error(dense_deltas(tmp_path / "out"), dense_deltas(adapter)) < 1e-7
    with pytest.raises(LoratoolError, match="dora"):
        loratool.rescale(adapter, tmp_path / "no", scale=2)


def test_files_that_record_alpha_or_nothing(tmp_path: Path) -> None:
    factors = {f"{Q}.lora_A": torch.randn(4, 10), f"{Q}.lora_B": torch.randn(12, 4)}
    save_file(factors, tmp_path / "bare.safetensors")
    save_file(factors | {f"{Q}.alpha": torch.tensor(2.0)}, tmp_path / "alpha.safetensors")
    loratool.rescale(tmp_path / "bare.safetensors", tmp_path / "b.safetensors", scale=0.3)
    found = load_file(tmp_path / "b.safetensors")
    assert torch.equal(found[f"{Q}.lora_A"], factors[f"{Q}.lora_A"])
    assert torch.allclose(found[f"{Q}.lora_B"], factors[f"{Q}.lora_B"] * 0.3)
    loratool.rescale(tmp_path / "alpha.safetensors", tmp_path / "a.safetensors", scale=0.5)
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found[f"{Q}.lora_B"], factors[f"{Q}.lora_B"])
    assert float(found[f"{Q}.alpha"]) == 1.0
    with pytest.raises(OptionError, match="no configuration"):
        loratool.rescale(tmp_path / "bare.safetensors", tmp_path / "no", to_rslora=True)


def test_dtype_converts_and_tells_the_error(make_adapter: Make, tmp_path: Path) -> None:
    adapter = patterned(make_adapter)
    report = loratool.rescale(adapter, tmp_path / "out", scale=1.0, dtype="bfloat16")
    assert {t.dtype for t in load_tensors(tmp_path / "out").values()} == {torch.bfloat16}
    error = relative_error(dense_deltas(tmp_path / "out"), dense_deltas(adapter))
    assert report.relative_error == pytest.approx(error, rel=1e-3)
    assert 1e-4 < error < 1e-2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "say what to do"),
        ({"scale": math.nan}, "no finite number"),
        ({"scale": 1, "alpha": 1}, "give one of"),
        ({"fold": True, "to_rslora": True}, "give one of"),
        ({"alpha": 1, "fold": True}, "both decide"),
        ({"max_norm": 0}, "not positive"),
        ({"keep": "delta", "scale": 1}, "needs it"),
        ({"keep": "delta", "alpha": 0}, "no factors keep"),
        ({"keep": "all", "alpha": 1}, "is none of"),
    ],
)
def test_options_that_make_no_sense(
    make_adapter: Make, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        loratool.rescale(patterned(make_adapter), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["peft", "kohya"])
@pytest.mark.parametrize("scale", [1e31, -1e300, 1e-46])
def test_no_alpha_is_written_that_is_not_read(
    make_adapter: Make, tmp_path: Path, scheme: str, scale: float
) -> None:
    adapter, output = make_adapter(lora(Q, 12, 10), target_modules=[Q]), tmp_path / "out"
    if scheme == "kohya":
        loratool.convert(adapter, "kohya", tmp_path / "k.safetensors")
        adapter, output = tmp_path / "k.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(OptionError, match="alpha would be"):
        loratool.rescale(adapter, output, scale=scale)
    assert not output.exists()


@pytest.mark.parametrize("alpha", [1e31, -1e40, math.inf, math.nan])
def test_no_alpha_is_taken_that_is_not_read(tmp_path: Path, alpha: float) -> None:
    save_file(lora(Q, 12, 10), tmp_path / "bare.safetensors")
    for scheme in ("peft", "kohya"):
        with pytest.raises(OptionError, match="no number that an alpha may be"):
            loratool.convert(tmp_path / "bare.safetensors", scheme, tmp_path / "out", alpha=alpha)
