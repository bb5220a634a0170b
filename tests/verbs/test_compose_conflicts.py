"""What adapters do to one module in different ways, and what that makes of the result."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deltas import load_config, load_tensors
from oracles import load_model, manifest, outputs_of
from safetensors.torch import save_file
from samples import FIXTURES, lora

import loratool
from loratool.errors import UnsupportedError

Make = Callable[..., Path]
Q = "layers.0.q_proj"


def adapter(name: str) -> Path:
    return FIXTURES / "adapters" / name


@pytest.mark.parametrize(
    "names",
    [
        ("tied-embed-only", "tied-modules-to-save-embed"),
        ("tied-embed-only", "tied-trainable-tokens"),
        ("tied-modules-to-save-embed", "tied-trainable-tokens"),
        ("tied-ensure-weight-tying", "tied-modules-to-save-ensure-weight-tying"),
    ],
    ids="+".join,
)
def test_a_delta_and_saved_weights_or_rows_do_not_mix(
    names: tuple[str, str], tmp_path: Path
) -> None:
    for order in (names, names[::-1]):
        with pytest.raises(UnsupportedError, match="no adapter can have both"):
            loratool.compose([adapter(name) for name in order], tmp_path / "out", extras="first")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ("tied-ensure-weight-tying", "tied-embed-only"),
        ("tied-head-only", "tied-ensure-weight-tying"),
        ("tied-ensure-weight-tying", "tied-ensure-weight-tying"),
        ("tied-ensure-weight-tying", "tied-ensure-weight-tying-ranks"),
    ],
    ids="+".join,
)
def test_ties_hold_or_are_given_up(names: tuple[str, str], tmp_path: Path) -> None:
    from peft import PeftModel

    case = next(case for case in manifest() if case["case"] == names[0])
    base = FIXTURES / case["base"]
    paths = [adapter(name) for name in names]
    loratool.compose(paths, tmp_path / "out", weights=[0.5, -0.7])
    is_tied = load_config(tmp_path / "out")["ensure_weight_tying"]
    assert is_tied == (names[0] == names[1])
    loratool.merge(base, [tmp_path / "out"], tmp_path / "merged", dtype="float32")
    loratool.merge(base, paths, tmp_path / "expected", weights=[0.5, -0.7], dtype="float32")
    wanted = outputs_of(case, load_model(case, tmp_path / "expected"))
    found = outputs_of(case, load_model(case, tmp_path / "merged"))
    assert float((found - wanted).abs().max()) < 1e-5
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(load_model(case, base), str(tmp_path / "out")).eval()
    assert [w for w in seen if "missing" in str(w.message) or "pattern" in str(w.message)] == []
    assert float((outputs_of(case, peft) - wanted).abs().max()) < 1e-5


def test_heads_of_files_without_a_configuration_are_listed(tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file(
        {
            f"{Q}.lora_A": torch.randn(2, 6),
            f"{Q}.lora_B": torch.randn(8, 2),
            "classifier.weight": torch.randn(3, 8),
            "classifier.bias": torch.randn(3),
        },
        bare,
    )
    loratool.compose([bare], tmp_path / "out", to="peft")
    assert load_config(tmp_path / "out")["modules_to_save"] == ["classifier"]
    assert "base_model.model.classifier.bias" in load_tensors(tmp_path / "out")


def test_one_bias_beside_b_gives_all_modules_one(make_adapter: Make, tmp_path: Path) -> None:
    one = make_adapter(
        {**lora("a", 6, 5), "a.lora_B.bias": torch.ones(6)},
        "one",
        target_modules=["a"],
        lora_bias=True,
    )
    other = make_adapter(lora("b", 7, 5), "other", target_modules=["b"])
    loratool.compose([one, other], tmp_path / "out")
    tensors = load_tensors(tmp_path / "out")
    assert torch.equal(tensors["base_model.model.b.lora_B.bias"], torch.zeros(7))
    table = make_adapter(
        {"e.lora_embedding_A": torch.randn(4, 9), "e.lora_embedding_B": torch.randn(5, 4)},
        "table",
        target_modules=["e"],
    )
    with pytest.raises(UnsupportedError, match="one switch"):
        loratool.compose([one, table], tmp_path / "no")
    assert loratool.compare([one, table]).cosine == 0


def test_a_budget_leaves_a_bias_its_module(make_adapter: Make, tmp_path: Path) -> None:
    tensors = {**lora("a", 16, 16), **{k: v * 1e-6 for k, v in lora("b", 16, 16).items()}}
    tensors |= {f"{name}.lora_B.bias": torch.ones(16) for name in "ab"}
    source = make_adapter(tensors, target_modules=["a", "b"], lora_bias=True)
    report = loratool.truncate(source, tmp_path / "out", max_size=1800)
    assert {m.module: m.rank for m in report.modules}["b"] >= 1
    assert "base_model.model.b.lora_B.bias" in load_tensors(tmp_path / "out")


def test_conv1d_layers_are_told_to_peft(tmp_path: Path) -> None:
    loratool.compose([adapter("gpt2-conv1d")], tmp_path / "bare", to="module-path")
    (tmp_path / "bare" / "adapter_config.json").unlink()
    loratool.compose([tmp_path / "bare"], tmp_path / "out", to="peft")
    assert load_config(tmp_path / "out")["fan_in_fan_out"] is True


def test_adalora_rounds_each_of_its_factors(tmp_path: Path) -> None:
    from deltas import relative_error

    def dense(folder: Path) -> dict[str, torch.Tensor]:
        tensors, config = load_tensors(folder), load_config(folder)
        scale = config["lora_alpha"] / (config["init_r"] + 1e-5)
        found = {}
        for key in (key for key in tensors if key.endswith(".lora_E")):
            name = key.removesuffix(".lora_E")
            down, up = (tensors[f"{name}.lora_{side}"].double() for side in "AB")
            found[name] = scale * up @ (down * tensors[key].double())
        return found

    source = adapter("adalora")
    report = loratool.rescale(source, tmp_path / "out", scale=0.5, dtype="bfloat16")
    truth = {name: 0.5 * delta for name, delta in dense(source).items()}
    error = relative_error(dense(tmp_path / "out"), truth)
    assert report.relative_error == pytest.approx(error, rel=1e-3)


def test_limits_of_norms_give_experts_no_patterns(tmp_path: Path) -> None:
    source = adapter("experts-mixtral")
    report = loratool.rescale(source, tmp_path / "out", max_norm=0.1)
    assert any(ratio != 1 for ratio in report.ratios.values())
    patterns = load_config(tmp_path / "out")["alpha_pattern"]
    assert not any("experts" in key for key in patterns)
    spectra = loratool.inspect(tmp_path / "out", spectrum=True).spectra
    assert all(spectrum.frobenius_norm < 0.1 * (1 + 1e-6) for spectrum in spectra)
