"""``extract``: round trips with merges, real PEFT, errors against dense SVDs, bad days."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deltas import dense_deltas, load_config, load_tensors
from oracles import FIXTURES, Case, load_model, manifest, outputs_of, read_all

import loratool
from loratool.errors import BaseModelError, LoratoolError, OptionError
from loratool.math.extraction import leading_part

Make = Callable[..., Path]
NAMES = (
    "lora-linear",
    "rank-pattern-only",
    "dora-linear",
    "gpt2-conv1d",
    "conv",
    "embedding-full-path",
    "bias-all",
    "modules-to-save",
    "seq-cls-score",
    "experts-gpt-oss",
    "experts-mixtral",
    "experts-per-expert",
    "clip-text",
    "llava",
)
CASES = [case for case in manifest() if case["case"] in NAMES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_what_a_merge_put_in_is_what_comes_out(case: Case, tmp_path: Path) -> None:
    base = FIXTURES / case["base"]
    tuned, again = tmp_path / "tuned", tmp_path / "again"
    loratool.merge(base, [FIXTURES / a for a in case["adapters"]], tuned, dtype="float32")
    out = tmp_path / "out"
    report = loratool.extract(base, tuned, out, rank=16, embeddings=True, residual="carry")
    assert report.relative_error < 2e-6
    assert report.captured > 1 - 1e-9
    loratool.merge(base, [out], again, dtype="float32")
    expected, found = read_all(tuned), read_all(again)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5), name


PEFT_CASES = [case for case in CASES if case["case"] not in ("experts-per-expert", "clip-text")]


@pytest.mark.slow
@pytest.mark.parametrize("case", PEFT_CASES, ids=lambda case: case["case"])
def test_peft_loads_what_was_extracted(case: Case, tmp_path: Path) -> None:
    from peft import PeftModel

    base, tuned, out = FIXTURES / case["base"], tmp_path / "tuned", tmp_path / "out"
    loratool.merge(base, [FIXTURES / a for a in case["adapters"]], tuned, dtype="float32")
    rank = 8 if case["case"] == "llava" else 16  # its modules have other names: no patterns
    loratool.extract(base, tuned, out, rank=rank, embeddings=True, residual="carry")
    model = load_model(case, base)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(model, str(out), **case.get("peft_kwargs", {})).eval()
    # PEFT fuses experts that are stored apart, and then warns about patterns of its own making.
    words = ("activation_checkpointing", "gate_up_proj")
    assert [w for w in seen if not any(word in str(w.message) for word in words)] == []
    wanted = outputs_of(case, load_model(case, tuned))
    error = (outputs_of(case, peft) - wanted).abs().max() / wanted.abs().max()
    assert float(error) < 1e-5


def pair(make: Make, change: dict[str, torch.Tensor], **kinds: Any) -> tuple[Path, Path]:
    """Write a base, and the same with ``change`` added."""
    weights = {name: torch.randn(value.shape) for name, value in change.items()}
    base = {name: value.to(**kinds) for name, value in weights.items()}
    tuned = {name: (base[name].float() + change[name]).to(**kinds) for name in change}
    return make(base, name="base"), make(tuned, name="tuned")


def decaying(m: int, n: int, power: float) -> torch.Tensor:
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(size, k).double()).Q for size in (m, n))
    return ((U * torch.arange(1, k + 1).double() ** -power) @ V.mT).float()


@pytest.mark.parametrize("kind", ["lora", "0.5", "0.1", "flat"])
@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.slow
def test_the_randomised_route_is_nearly_optimal(kind: str, rank: int) -> None:
    if kind == "lora":
        delta = torch.randn(600, 16) @ torch.randn(16, 480) / 20 + 0.02 * torch.randn(600, 480)
    elif kind == "flat":
        delta = torch.randn(600, 480)
    else:
        delta = decaying(600, 480, float(kind))
    values = torch.linalg.svdvals(delta.double())
    found = leading_part(delta, rank, np.random.default_rng(3), method="randomised")
    optimum = float(values[rank:].square().sum())
    assert math.sqrt(found.squared_residual / optimum) < (
        1.01 if kind in ("0.1", "flat") else 1.005
    )
    lost = (delta.double() - found.up.double() @ found.down.double()).square().sum()
    assert found.squared_residual == pytest.approx(float(lost), rel=1e-5)
    assert found.squared_norm == pytest.approx(float(delta.double().square().sum()), rel=1e-12)
    assert float((found.singular_values - values[:rank]).max()) < 1e-4 * float(values[0])


def sparse(kind: str) -> torch.Tensor:
    delta = torch.zeros(600, 700)
    match kind:
        case "integers":
            return (torch.randint(-3, 4, (600, 2)) @ torch.randint(-3, 4, (2, 700))).float()
        case "row":
            delta[3] = 1
        case "column":
            delta[:, 3] = 1
        case "rows":
            delta[:20] = torch.randn(20, 700)
        case "entries":
            delta[torch.arange(10) * 7, torch.arange(10) * 11] = 1
        case "constant":
            delta += 1
        case "huge":
            return sparse("integers") * 1e18
        case "tiny":
            return sparse("integers") * 1e-22
    return delta


@pytest.mark.parametrize(
    "kind", ["integers", "row", "column", "rows", "entries", "constant", "huge", "tiny"]
)
@pytest.mark.parametrize("rank", [1, 8, 16])
@pytest.mark.slow
def test_rank_deficient_differences_do_not_mislead_the_randomised_route(
    kind: str, rank: int
) -> None:
    delta = sparse(kind)
    values = torch.linalg.svdvals(delta.double())
    found = leading_part(delta, rank, np.random.default_rng(1), method="randomised")
    lost = float((delta.double() - found.up.double() @ found.down.double()).norm())
    close = 2e-6 * float(values.norm())
    assert lost <= 1.005 * float(values[rank:].norm()) + close
    assert math.sqrt(found.squared_residual) == pytest.approx(lost, rel=1e-3, abs=close)


@pytest.mark.parametrize("shape", [(700, 900), (900, 700), (40, 900), (60, 50)])
def test_the_exact_route_is_optimal(shape: tuple[int, int]) -> None:
    delta = decaying(*shape, 0.5)
    values = torch.linalg.svdvals(delta.double())
    found = leading_part(delta, 9, np.random.default_rng(0), method="exact")
    assert found.is_exact
    assert torch.allclose(found.singular_values, values[:9], rtol=1e-5)
    optimum = float(values[9:].square().sum())
    assert found.squared_residual == pytest.approx(optimum, rel=1e-4)


@pytest.mark.parametrize("size", [64, 700])
def test_exactly_low_rank_differences_are_recovered(
    make_base: Make, tmp_path: Path, size: int
) -> None:
    delta = torch.randn(size, 5) @ torch.randn(5, size + 20)
    base, tuned = pair(make_base, {"a.q_proj.weight": delta})
    report = loratool.extract(base, tuned, tmp_path / "out", rank=5)
    exact = read_all(tuned)["a.q_proj.weight"].double() - read_all(base)["a.q_proj.weight"].double()
    found = dense_deltas(tmp_path / "out")["a.q_proj"]
    error = float((found - exact).norm() / exact.norm())
    assert error < 1e-5
    assert report.relative_error == pytest.approx(error, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_what_was_written(
    make_base: Make, tmp_path: Path, dtype: torch.dtype
) -> None:
    changes = {"a.q_proj.weight": decaying(90, 70, 0.5), "b.q_proj.weight": decaying(40, 60, 1.0)}
    base, tuned = pair(make_base, changes, dtype=dtype)
    report = loratool.extract(base, tuned, tmp_path / "out", rank=6)
    assert {t.dtype for t in load_tensors(tmp_path / "out").values()} == {dtype}
    for module in report.modules:
        name = f"{module.module}.weight"
        exact = read_all(tuned)[name].double() - read_all(base)[name].double()
        found = dense_deltas(tmp_path / "out")[module.module]
        error = float((found - exact).norm() / exact.norm())
        assert module.relative_error == pytest.approx(error, rel=1e-3)
        values = torch.linalg.svdvals(exact)[:6]
        assert torch.allclose(torch.tensor(module.singular_values).double(), values, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"energy": 0.8},
        {"max_error": 0.2},
        {"sv_ratio": 3.0},
        {"sv_fro": 0.9},
        {"sv_cumulative": 0.6},
    ],
    ids=lambda options: next(iter(options)),
)
def test_rules_give_the_smallest_rank(
    make_base: Make, tmp_path: Path, options: dict[str, float]
) -> None:
    base, tuned = pair(make_base, {"a.q_proj.weight": decaying(300, 280, 0.6)})
    report = loratool.extract(base, tuned, tmp_path / "out", **options)
    tensors = [read_all(path)["a.q_proj.weight"].double() for path in (tuned, base)]
    values = torch.linalg.svdvals(tensors[0] - tensors[1])
    (rule, value), squares = next(iter(options.items())), values.square()
    kept = squares.cumsum(0) / squares.sum()
    expected = {
        "energy": int((kept < value).sum()) + 1,
        "max_error": int((1 - kept > value**2).sum()) + 1,
        "sv_ratio": int((values > values[0] / value).sum()),
        "sv_fro": int((kept < value**2).sum()) + 1,
        "sv_cumulative": int((values.cumsum(0) / values.sum() < value).sum()) + 1,
    }[rule]
    assert report.modules[0].rank == expected


def test_a_budget_is_kept(make_base: Make, tmp_path: Path) -> None:
    changes = {f"{name}.q_proj.weight": decaying(64, 48, 0.7) for name in "abc"}
    base, tuned = pair(make_base, changes)
    for size in (3000, 6000, 20000):
        out = tmp_path / str(size)
        report = loratool.extract(base, tuned, out, max_size=size)
        written = (out / "adapter_model.safetensors").stat().st_size
        assert written <= size
        ranks = [module.rank for module in report.modules]
        assert max(ranks) - min(ranks) <= 1
    with pytest.raises(LoratoolError, match="do not hold"):
        loratool.extract(base, tuned, tmp_path / "no", max_size=500)


def best_spread(changes: dict[str, torch.Tensor], budget: int) -> float:
    """The least squared error that factors of so many bytes leave, by the gain for each byte."""
    gains: list[tuple[float, float, int]] = []
    for change in changes.values():
        cost = 4 * sum(change.shape)
        squares = torch.linalg.svdvals(change.double()).square().tolist()
        gains += [(square / cost, square, cost) for square in squares]
    lost = 0.0
    for _, square, cost in sorted(gains, reverse=True):
        part = min(1.0, budget / cost)  # of the first that does not fit, as much as does
        budget -= round(part * cost)
        lost += (1 - part) * square
    return lost


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_a_budget_gets_the_best_spread(make_base: Make, tmp_path: Path, share: float) -> None:
    """Also where single modules deserve far more ranks than others."""
    sides = [(192, 192), (48, 192), (320, 192)]
    changes = {
        f"{number}.q_proj.weight": decaying(*sides[number % 3], 0.3 + 0.1 * (number // 3))
        for number in range(12)
    }
    base, tuned = pair(make_base, changes)
    budget = int(share * 4 * sum(min(c.shape) * sum(c.shape) for c in changes.values()))
    report = loratool.extract(base, tuned, tmp_path / "out", max_size=budget)
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert len(weights) <= budget
    header = 8 + int.from_bytes(weights[:8], "little")
    lost = math.fsum(module.squared_error for module in report.modules)
    assert lost <= 1.002 * best_spread(changes, budget - header)


def test_auto_stops_at_the_noise_of_rounding(make_base: Make, tmp_path: Path) -> None:
    delta = torch.randn(300, 7) @ torch.randn(7, 280) * 0.2
    base, tuned = pair(make_base, {"a.q_proj.weight": delta}, dtype=torch.bfloat16)
    report = loratool.extract(base, tuned, tmp_path / "out", rank="auto")
    assert report.modules[0].rank == 7
    assert any("rounding" in note for note in report.notes)
    tensors = [read_all(path)["a.q_proj.weight"].double() for path in (tuned, base)]
    noise = torch.linalg.svdvals(tensors[0] - tensors[1])[7]
    assert report.modules[0].floor == pytest.approx(float(noise), rel=0.15)


def test_selection_and_what_is_left_over(make_base: Make, tmp_path: Path) -> None:
    changes = {
        "model.embed_tokens.weight": torch.randn(30, 8),
        "model.layers.0.q_proj.weight": torch.randn(12, 8),
        "model.layers.0.v_proj.weight": torch.randn(12, 8),
        "model.layers.0.k_proj.weight": torch.zeros(12, 8),
        "model.layers.0.q_proj.bias": torch.randn(12),
        "model.layers.0.norm.weight": torch.randn(8),
        "lm_head.weight": torch.randn(30, 8),
    }
    base, tuned = pair(make_base, changes)
    report = loratool.extract(base, tuned, tmp_path / "some", rank=2, exclude=["v_proj"])
    assert [m.module for m in report.modules] == ["lm_head", "model.layers.0.q_proj"]  # untied
    assert report.unchanged == 1
    left = {item.name: item.why for item in report.leftovers}
    assert left["model.layers.0.v_proj.weight"] == "excluded by --exclude"
    assert "--embeddings" in left["model.embed_tokens.weight"]
    assert left["model.layers.0.q_proj.bias"] == "a bias"
    assert left["model.layers.0.norm.weight"] == "a vector, such as a norm"
    total = sum(float(delta.square().sum()) for delta in changes.values())
    assert report.total_change == pytest.approx(total, rel=1e-5)
    report = loratool.extract(
        base,
        tuned,
        tmp_path / "all",
        rank=8,
        embeddings=True,
        residual="carry",
        save_module=["lm_head"],
    )
    assert report.captured > 1 - 1e-9
    config, tensors = load_config(tmp_path / "all"), load_tensors(tmp_path / "all")
    assert config["modules_to_save"] == ["lm_head", "model.layers.0.norm"]
    assert config["bias"] == "lora_only"
    assert "base_model.model.model.layers.0.q_proj.base_layer.bias" in tensors
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in tensors
    loratool.merge(base, [tmp_path / "all"], tmp_path / "merged")
    for name, value in read_all(tuned).items():
        assert torch.allclose(read_all(tmp_path / "merged")[name], value, atol=1e-5), name


def test_tensors_in_one_model_only_or_of_another_shape_are_named(
    make_base: Make, tmp_path: Path
) -> None:
    shared = torch.randn(12, 8)
    base = make_base(
        {"a.q.weight": shared, "e.weight": torch.ones(5, 4), "old.weight": shared.clone()},
        name="base",
    )
    tuned = make_base(
        {"a.q.weight": shared + 1, "e.weight": torch.ones(7, 4), "score.weight": shared.clone()},
        name="tuned",
    )
    report = loratool.extract(base, tuned, tmp_path / "out", rank=2)
    left = {item.name: item.why for item in report.leftovers}
    assert left["e.weight"] == "another shape: [5, 4] in the base, [7, 4] here"
    assert left["score.weight"] == "the base has no such tensor"
    assert left["old.weight"] == "the finetuned model has no such tensor"


def test_only_another_dtype_is_no_change(make_base: Make, tmp_path: Path) -> None:
    weights = torch.randn(12, 8)
    base = make_base({"a.q.weight": weights}, name="base")
    tuned = make_base({"a.q.weight": weights.bfloat16()}, name="tuned")
    with pytest.raises(BaseModelError, match="differs from the base in nothing"):
        loratool.extract(base, tuned, tmp_path / "out", rank=2)
    assert list(tmp_path.iterdir()) == [base, tuned] or not (tmp_path / "out").exists()


def test_the_same_seed_gives_the_same_bytes(make_base: Make, tmp_path: Path) -> None:
    base, tuned = pair(make_base, {"a.q.weight": decaying(500, 400, 0.3)})
    for name, threads, seed in (("a", 1, 1), ("b", 4, 1), ("c", 1, 2)):
        loratool.extract(base, tuned, tmp_path / name, rank=8, threads=threads, seed=seed)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_clamping_costs_and_says_so(make_base: Make, tmp_path: Path) -> None:
    base, tuned = pair(make_base, {"a.q.weight": torch.randn(60, 4) @ torch.randn(4, 50)})
    plain = loratool.extract(base, tuned, tmp_path / "plain", rank=4)
    clamped = loratool.extract(base, tuned, tmp_path / "clamped", rank=4, clamp_quantile=0.99)
    assert clamped.relative_error > 100 * plain.relative_error
    tensors = [read_all(path)["a.q.weight"].double() for path in (tuned, base)]
    exact = tensors[0] - tensors[1]
    error = float((dense_deltas(tmp_path / "clamped")["a.q"] - exact).norm() / exact.norm())
    assert clamped.relative_error == pytest.approx(error, rel=1e-3)


def test_an_interrupted_run_is_taken_up_again(
    make_base: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratool.verbs.extraction import decomposition as running

    base, tuned = pair(make_base, {f"{name}.q.weight": torch.randn(12, 9) for name in "abcd"})
    loratool.extract(base, tuned, tmp_path / "whole", rank=3)
    done: list[str] = []
    real = running.decompose

    def failing(target: Any, *rest: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(target.name)
        return real(target, *rest)

    monkeypatch.setattr(running, "decompose", failing)
    for resume in (False, True):
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            loratool.extract(base, tuned, tmp_path / "out", rank=3, resume=resume, threads=1)
        left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert left == ([".out.loratool-unfinished"] if resume else [])
    with pytest.raises(OptionError, match="other inputs or options"):
        loratool.extract(base, tuned, tmp_path / "out", rank=4, resume=True)
    monkeypatch.setattr(
        running,
        "decompose",
        lambda target, *rest: (done.append(target.name), real(target, *rest))[1],
    )
    done.clear()
    loratool.extract(base, tuned, tmp_path / "out", rank=3, resume=True)
    assert sorted(done) == ["c.q", "d.q"]
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / ".out.loratool-unfinished").exists()


def test_spectra_let_truncate_choose_ranks_without_the_models(
    make_base: Make, tmp_path: Path
) -> None:
    base, tuned = pair(make_base, {"a.q.weight": decaying(90, 80, 0.5)})
    spectrum = tmp_path / "spectrum.json"
    loratool.extract(base, tuned, tmp_path / "wide", rank=60, save_spectrum=spectrum)
    direct = loratool.extract(base, tuned, tmp_path / "direct", max_error=0.5)
    later = loratool.truncate(
        tmp_path / "wide", tmp_path / "later", max_error=0.5, spectrum=spectrum
    )
    assert later.modules[0].rank == direct.modules[0].rank
    alone = loratool.truncate(tmp_path / "wide", tmp_path / "alone", max_error=0.5)
    assert alone.modules[0].rank < later.modules[0].rank
    document = json.loads(spectrum.read_text())
    assert document["modules"][0]["module"] == "a.q"


def test_a_dry_run_reads_headers_alone(make_base: Make, tmp_path: Path) -> None:
    base, tuned = pair(make_base, {"a.q.weight": torch.randn(12, 9)})
    report = loratool.extract(base, tuned, tmp_path / "out", rank=3, dry_run=True)
    assert [(m.module, m.rank) for m in report.modules] == [("a.q", 3)]
    assert report.seconds is not None and report.seconds < 60
    done = loratool.extract(base, tuned, tmp_path / "out", rank=3)
    assert done.plan.nbytes == report.plan.nbytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "say how far"),
        ({"rank": "big"}, "neither a number nor auto"),
        ({"rank": "auto", "energy": 0.5}, "both decide"),
        ({"rank": 2, "method": "quick"}, "is none of"),
        ({"rank": 2, "residual": "drop"}, "is none of"),
        ({"rank": 2, "clamp_quantile": 0.1}, "is not in"),
        ({"rank": 2, "include": ["("]}, "regular expression"),
        ({"rank": 2, "save_module": ["nothing"]}, "no module 'nothing'"),
    ],
)
def test_options_that_make_no_sense(
    make_base: Make, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    base, tuned = pair(make_base, {"a.q.weight": torch.randn(12, 9)})
    with pytest.raises(OptionError, match=words):
        loratool.extract(base, tuned, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_budget_that_leaves_modules_out_says_so(make_base: Make, tmp_path: Path) -> None:
    changes = {
        f"{name}.q.weight": torch.randn(64, 48) * size
        for name, size in (("a", 1.0), ("b", 0.5), ("c", 1e-3))
    }
    base, tuned = pair(make_base, changes)
    report = loratool.extract(
        base, tuned, tmp_path / "out", max_size=2000, save_spectrum=tmp_path / "s.json"
    )
    assert {m.module: m.rank for m in report.modules}["c.q"] == 0
    assert "c.q" in dict(report.plan.dropped)
    names = [m["module"] for m in json.loads((tmp_path / "s.json").read_text())["modules"]]
    assert sorted(names) == ["a.q", "b.q", "c.q"]


def test_infinities_that_stay_are_no_change(make_base: Make, tmp_path: Path) -> None:
    mask = {"mask": torch.full((5,), -math.inf), "ids": torch.arange(4)}
    weight = torch.randn(12, 9)
    base = make_base({"a.q.weight": weight, **mask}, name="base")
    tuned = make_base({"a.q.weight": weight + 1, **mask}, name="tuned")
    report = loratool.extract(base, tuned, tmp_path / "out", rank=2)
    assert report.leftovers == ()
    json.dumps(report.as_json(), allow_nan=False)


@pytest.mark.slow
def test_ties_hold_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    case = next(case for case in manifest() if case["case"] == "tied-embed-only")
    base, tuned = FIXTURES / case["base"], tmp_path / "tuned"
    model = load_model(case, base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(tuned)
    wanted = outputs_of(case, model)
    for name, options in (("factors", {"embeddings": True}), ("whole", {})):
        out = tmp_path / name
        loratool.extract(base, tuned, out, rank=64, residual="carry", **options)
        assert load_config(out)["ensure_weight_tying"] is True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft = PeftModel.from_pretrained(load_model(case, base), str(out)).eval()
        error = (outputs_of(case, peft) - wanted).abs().max() / wanted.abs().max()
        assert float(error) < 1e-5


@pytest.mark.slow
def test_routers_are_left_over(tmp_path: Path) -> None:
    case = next(case for case in manifest() if case["case"] == "experts-gpt-oss")
    base, tuned = FIXTURES / case["base"], tmp_path / "tuned"
    model = load_model(case, base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router.weight" in name or "q_proj.weight" in name:
                parameter += torch.randn(parameter.shape)
    model.save_pretrained(tuned)
    report = loratool.extract(base, tuned, tmp_path / "out", rank=4)
    assert {item.why for item in report.leftovers} == {"a router, which PEFT does not adapt"}


def test_models_with_nothing_in_common_or_not_finite_are_refused(
    make_base: Make, tmp_path: Path
) -> None:
    base = make_base({"a.q.weight": torch.ones(4, 4)}, name="base")
    other = make_base({"b.q.weight": torch.ones(4, 4)}, name="other")
    with pytest.raises(BaseModelError, match="no tensor in common"):
        loratool.extract(base, other, tmp_path / "out", rank=2)
    broken = make_base({"a.q.weight": torch.full((4, 4), math.nan)}, name="broken")
    with pytest.raises(BaseModelError, match="not finite"):
        loratool.extract(base, broken, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_clamping_works_for_any_size() -> None:
    """torch's quantile takes 16 million elements; numpy's any."""
    from loratool.verbs.extraction.difference import _clamped

    up, down = np.ones((4200, 2100), np.float32), np.ones((2100, 4000), np.float32)
    up[0, 0] = 100
    left, right = _clamped(up, down, 0.999)
    assert up.size + down.size > 1 << 24
    assert float(left.max()) == float(right.max()) == 1


def test_as_many_modules_are_in_work_as_there_are_processors_and_memory(
    make_base: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratool.verbs.extraction import pipeline

    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(24)))
    changes = {f"m{number}.q_proj.weight": torch.randn(400, 400) for number in range(3)}
    base, tuned = pair(make_base, changes)
    seen: list[int] = []
    made = pipeline.HostDifferences

    def noted(threads: int) -> Any:
        seen.append(threads)
        return made(threads)

    monkeypatch.setattr(pipeline, "HostDifferences", noted)
    loratool.extract(base, tuned, tmp_path / "one", rank=2)
    monkeypatch.setattr(pipeline, "MEMORY", 5 * 4 * 400 * 400)
    loratool.extract(base, tuned, tmp_path / "other", rank=2)
    loratool.extract(base, tuned, tmp_path / "third", rank=2, threads=3)
    assert seen == [24, 5, 3]


def test_equal_singular_values_are_searched_to_the_end(make_base: Make, tmp_path: Path) -> None:
    weight = torch.randint(-64, 64, (300, 300)) / 64
    base = make_base({"q_proj.weight": weight}, name="base")
    tuned = make_base({"q_proj.weight": weight + 0.5 * torch.eye(300)}, name="tuned")
    found = loratool.extract(base, tuned, tmp_path / "out", rank="auto", dtype="float32")
    assert found.modules[0].rank == 300
    few = loratool.extract(base, tuned, tmp_path / "few", max_error=0.5, rank=64)
    assert few.relative_error == pytest.approx(math.sqrt(236 / 300), rel=2e-3)


@pytest.mark.parametrize("scale", [1e-22, 1e-6, 1.0, 1e15])
def test_the_error_of_clamped_factors_is_the_true_one(
    make_base: Make, tmp_path: Path, scale: float
) -> None:
    change = torch.randn(80, 60).double() * scale
    base = make_base({"q_proj.weight": torch.zeros(80, 60)}, name="base")
    tuned = make_base({"q_proj.weight": change.float()}, name="tuned")
    report = loratool.extract(base, tuned, tmp_path / "out", rank=8, clamp_quantile=0.9)
    made = dense_deltas(tmp_path / "out")["q_proj"]
    exact = change.float().double()
    error = float((made - exact).norm() / exact.norm())
    assert report.relative_error == pytest.approx(error, rel=1e-3)
