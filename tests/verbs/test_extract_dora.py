"""``extract --variant dora``: factors, and a length for every row."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deltas import load_tensors
from oracles import read_all

import loratool
from loratool.errors import BaseModelError, OptionError, UnsupportedError
from loratool.math.dora import nearest_dora
from loratool.math.extraction import Leading, leading_part

SHAPES = {"a.q_proj": (70, 90), "b.up_proj": (120, 50)}


def trained(weight: torch.Tensor, rank: int, spread: float) -> torch.Tensor:
    """Return what a DoRA of some rank makes of a weight."""
    m, n = weight.shape
    changed = weight.double() + torch.randn(m, rank) @ torch.randn(rank, n) * 0.1
    lengths = changed.norm(dim=1) * (1 + spread * torch.randn(m))
    return changed / changed.norm(dim=1, keepdim=True) * lengths[:, None]


def make_pair(make_base: Any, dtype: torch.dtype, spread: float = 0.1) -> tuple[Path, Path]:
    base = {f"{name}.weight": torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    tuned = {name: trained(weight, 4, spread).to(dtype) for name, weight in base.items()}
    return make_base(base, name="base"), make_base(tuned, name="tuned")


def error_of(base: Path, tuned: Path, merged: Path) -> float:
    before, after, made = (read_all(path) for path in (base, tuned, merged))
    lost = sum(float((made[n].double() - after[n].double()).square().sum()) for n in after)
    whole = sum(float((after[n].double() - before[n].double()).square().sum()) for n in after)
    return (lost / whole) ** 0.5


@pytest.mark.parametrize("scheme", ["peft", "kohya", "comfy", "diffusers", "module-path"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_merged_has_the_error_that_was_told(
    make_base: Any, tmp_path: Path, scheme: str, dtype: torch.dtype
) -> None:
    pair = make_pair(make_base, dtype)
    out = tmp_path / ("out" if scheme == "peft" else "out.safetensors")
    report = loratool.extract(*pair, out, rank=4, variant="dora", to=scheme)
    loratool.merge(pair[0], [out], tmp_path / "merged", dtype="float32")
    found = error_of(*pair, tmp_path / "merged")
    assert report.relative_error == pytest.approx(found, rel=1e-3, abs=2e-6)
    assert found < (1e-4 if dtype is torch.float32 else 0.02)
    plain = loratool.extract(*pair, tmp_path / "plain", rank=4)
    assert plain.relative_error > 0.1
    told = [module["plain_relative_error"] for module in report.as_json()["modules"]]
    assert told == pytest.approx([m.relative_error for m in plain.modules], rel=1e-4)
    assert any("plain LoRA of the same ranks" in note for note in report.notes)


def test_peft_computes_with_it(make_base: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(90, 70, bias=False)
            self.up_proj = torch.nn.Linear(50, 120, bias=False)

    weights = {"q_proj.weight": torch.randn(70, 90), "up_proj.weight": torch.randn(120, 50)}
    tuned = {name: trained(weight, 4, 0.1).float() for name, weight in weights.items()}
    pair = make_base(weights, name="base"), make_base(tuned, name="tuned")
    loratool.extract(*pair, tmp_path / "out", rank=4, variant="dora")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is True
    model = Model()
    model.load_state_dict(weights)
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path / "out")).merge_and_unload()
    for name, wanted in tuned.items():
        made = merged.state_dict()[name]
        assert float((made - wanted).norm() / (wanted - weights[name]).norm()) < 1e-4


def test_a_change_of_low_rank_alone_is_found_too(make_base: Any, tmp_path: Path) -> None:
    weight = torch.randn(70, 90)
    tuned = weight + torch.randn(70, 4) @ torch.randn(4, 90) * 0.1
    pair = (
        make_base({"q_proj.weight": weight}, name="base"),
        make_base({"q_proj.weight": tuned}, name="tuned"),
    )
    report = loratool.extract(*pair, tmp_path / "out", rank=4, variant="dora")
    assert report.relative_error < 1e-4


def test_lengths_are_written_in_float32(make_base: Any, tmp_path: Path) -> None:
    """Eight bits of them would lose as much as all of the weight's rounding."""
    pair = make_pair(make_base, torch.bfloat16)
    loratool.extract(*pair, tmp_path / "out", rank=4, variant="dora", dtype="bfloat16")
    kinds = {
        n.rpartition("lora_")[2][:9]: t.dtype for n, t in load_tensors(tmp_path / "out").items()
    }
    assert kinds["magnitude"] is torch.float32
    assert {kinds["A.weight"], kinds["B.weight"]} == {torch.bfloat16}


def test_gpt2s_transposed_layers(make_base: Any, tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    name = "h.0.attn.c_attn.weight"
    weight = torch.randn(40, 120)
    tuned = trained(weight.T, 4, 0.1).T.float().contiguous()
    pair = (
        make_base({name: weight}, config, name="base"),
        make_base({name: tuned}, config, name="tuned"),
    )
    loratool.extract(*pair, tmp_path / "out", rank=4, variant="dora")
    loratool.merge(pair[0], [tmp_path / "out"], tmp_path / "merged")
    assert error_of(*pair, tmp_path / "merged") < 1e-4


def test_a_run_is_taken_up_again(make_base: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from loratool.verbs.extraction import pipeline

    pair = make_pair(make_base, torch.float32)
    options: dict[str, Any] = {"rank": 4, "variant": "dora"}
    loratool.extract(*pair, tmp_path / "whole", **options)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "write_plan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loratool.extract(*pair, tmp_path / "out", resume=True, **options)
    loratool.extract(*pair, tmp_path / "out", resume=True, **options)
    one, other = (load_tensors(tmp_path / name) for name in ("whole", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "options",
    [{"rank": "auto"}, {"max_error": 0.1, "rank": 8}, {"max_size": "1MB"}, {"energy": 0.9}],
)
def test_other_rules_are_refused(make_base: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    pair = make_pair(make_base, torch.float32)
    with pytest.raises(OptionError, match="a number as --rank"):
        loratool.extract(*pair, tmp_path / "out", variant="dora", **options)


def test_what_no_library_has_doras_for_is_left_over_and_told(
    make_base: Any, tmp_path: Path
) -> None:
    base = {"conv.weight": torch.randn(8, 4, 3, 3), "q_proj.weight": torch.randn(70, 90)}
    tuned = {name: weight + torch.randn(weight.shape) for name, weight in base.items()}
    pair = make_base(base, name="base"), make_base(tuned, name="tuned")
    report = loratool.extract(*pair, tmp_path / "out", rank=4, variant="dora")
    assert [(item.name, "dora" in item.why) for item in report.leftovers] == [("conv.weight", True)]
    with pytest.raises(UnsupportedError, match="no linear layer"):
        loratool.extract(*pair, tmp_path / "more", rank=4, variant="dora", exclude=["q_proj"])


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_run_is_not_taken_up_for_another_dtype(
    make_base: Any, tmp_path: Path, monkeypatch: Any, dtypes: tuple[str, str]
) -> None:
    from loratool.verbs.extraction import pipeline

    pair = make_pair(make_base, torch.float32)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"rank": 4, "variant": "dora", "resume": True}
    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "write_plan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loratool.extract(*pair, tmp_path / "out", dtype=dtypes[0], **options)
    with pytest.raises(OptionError, match="other inputs or options"):
        loratool.extract(*pair, tmp_path / "out", dtype=dtypes[1], **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_have_no_length(
    make_base: Any, tmp_path: Path, value: float
) -> None:
    weight = torch.randn(70, 90)
    weight[3, 4] = value
    tensors = {"model.0.q_proj.weight": weight, "model.0.k_proj.weight": torch.randn(70, 90)}
    changed = {name: tensor + 0.1 * torch.randn(70, 90) for name, tensor in tensors.items()}
    pair = make_base(tensors, name="base"), make_base(changed, name="tuned")
    with pytest.raises(BaseModelError, match="have no length") as caught:
        loratool.extract(*pair, tmp_path / "out", rank=4, variant="dora")
    (pattern,) = shlex.split(str(caught.value.hint).partition("--exclude ")[2])
    loratool.extract(*pair, tmp_path / "out", rank=4, variant="dora", exclude=[pattern])


def test_what_was_only_converted_is_no_change(make_base: Any, tmp_path: Path) -> None:
    weight = torch.randn(70, 90)
    tuned = weight.bfloat16()
    tuned[:3] += 1
    pair = (
        make_base({"q_proj.weight": weight}, name="base"),
        make_base({"q_proj.weight": tuned}, name="tuned"),
    )
    report = loratool.extract(*pair, tmp_path / "out", rank=4, variant="dora")
    assert report.relative_error < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-9, 1e-5, 1.0])
def test_it_is_no_worse_than_plain_factors_but_for_the_rounding_of_lengths(
    make_base: Any, tmp_path: Path, dtype: torch.dtype, size: float
) -> None:
    weight = torch.randn(70, 90, dtype=dtype)
    tuned = weight + size * torch.randn(70, 90, dtype=dtype)
    pair = (
        make_base({"q_proj.weight": weight}, name="base"),
        make_base({"q_proj.weight": tuned}, name="tuned"),
    )
    if torch.equal(weight, tuned):
        pytest.skip("no change that float32 can tell")
    dora = loratool.extract(*pair, tmp_path / "dora", rank=8, variant="dora").modules[0]
    plain = loratool.extract(*pair, tmp_path / "plain", rank=8).modules[0]
    lengths = 2.0**-24 * float(weight.norm()) if dtype is torch.float32 else 0.0
    assert dora.squared_error**0.5 <= 1.001 * plain.squared_error**0.5 + 2 * lengths


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_gpu_that_is_not_there_is_refused_here_too(
    make_base: Any, tmp_path: Path, dry_run: bool
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    pair = make_pair(make_base, torch.float32)
    with pytest.raises(UnsupportedError, match="--device cuda"):
        loratool.extract(
            *pair, tmp_path / "out", rank=4, variant="dora", device="cuda", dry_run=dry_run
        )


def test_rows_of_zeros_have_no_length() -> None:
    before = np.random.default_rng(0).standard_normal((30, 40))
    after = before * 1.1
    before[3], after[3], after[5] = 0, 0, 0

    def lead(delta: np.ndarray) -> Leading:
        return leading_part(delta, 2, np.random.default_rng(0))

    found = nearest_dora(before, after, lead(after - before), lead, lambda factor: factor)
    assert np.isfinite(found.magnitude).all()
    assert found.squared_error < 1e-6 * np.square(after - before).sum()
