"""``truncate``: every rule on real files, budgets, bases, and what is left as it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deltas import dense_deltas, load_config, load_tensors, relative_error
from safetensors.torch import load_file, save, save_file
from samples import FIXTURES, lora

import loratool
from loratool.errors import OptionError, UnsupportedError
from loratool.verbs.algebra.ranks import parse_size

Make = Callable[..., Path]
NAMES = ("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj")


def make(make_adapter: Make, rank: int = 6, dtype: torch.dtype = torch.float32) -> Path:
    tensors = {}
    for index, name in enumerate(NAMES):
        for key, value in lora(name, 20 + 4 * index, 16, rank).items():
            decay = torch.tensor([2.0 ** -(i + index) for i in range(rank)])
            shape = (-1, 1) if "lora_A" in key else (1, -1)
            tensors[key] = (value * decay.reshape(shape)).to(dtype)
    return make_adapter(tensors, f"r{rank}", r=rank, lora_alpha=3, target_modules=list(NAMES))


def tails(adapter: Path, ranks: dict[str, int]) -> float:
    deltas = dense_deltas(adapter)
    lost = sum(
        float(torch.linalg.svdvals(delta)[ranks.get(name, 0) :].square().sum())
        for name, delta in deltas.items()
    )
    return (lost / sum(float(d.square().sum()) for d in deltas.values())) ** 0.5


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncation_is_optimal_and_its_error_is_told(
    make_adapter: Make, tmp_path: Path, rank: int
) -> None:
    adapter = make(make_adapter)
    report = loratool.truncate(adapter, tmp_path / "out", rank=rank)
    truth = dense_deltas(adapter)
    error = relative_error(dense_deltas(tmp_path / "out"), truth)
    assert error <= 1.0001 * tails(adapter, dict.fromkeys(NAMES, rank))
    assert report.relative_error == pytest.approx(error, rel=1e-3)
    for module in report.modules:
        values = torch.linalg.svdvals(truth[module.module])
        assert torch.allclose(torch.tensor(module.singular_values).double(), values[:rank])
        assert module.rank == rank
    tensors = load_tensors(tmp_path / "out")
    for name in NAMES:  # split evenly
        down = tensors[f"base_model.model.{name}.lora_A.weight"].double()
        up = tensors[f"base_model.model.{name}.lora_B.weight"].double()
        assert torch.allclose(down.norm(dim=1), up.norm(dim=0), rtol=1e-5)
    config = load_config(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (rank, rank, {})


def test_a_rank_that_changes_nothing_copies_the_factors(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make(make_adapter, dtype=torch.bfloat16)
    report = loratool.truncate(adapter, tmp_path / "out", rank=64)
    assert report.relative_error == 0
    before, after = load_tensors(adapter), load_tensors(tmp_path / "out")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert load_config(tmp_path / "out")["lora_alpha"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [0.5, 0.1, 0.02])
def test_max_error_holds_for_what_is_written_and_is_minimal(
    make_adapter: Make, tmp_path: Path, dtype: torch.dtype, limit: float
) -> None:
    adapter = make(make_adapter, dtype=dtype)
    report = loratool.truncate(adapter, tmp_path / "out", max_error=limit)
    truth, found = dense_deltas(adapter), dense_deltas(tmp_path / "out")
    for module in report.modules:
        name = module.module
        error = relative_error({name: found[name]}, {name: truth[name]})
        assert error <= limit
        assert module.relative_error == pytest.approx(error, rel=1e-3, abs=1e-9)
        if module.rank > 1:
            less = torch.linalg.svdvals(truth[name])[module.rank - 1 :].norm()
            assert float(less / truth[name].norm()) > limit * (0.8 if dtype.itemsize < 4 else 1)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_energy_is_minimal(make_adapter: Make, tmp_path: Path, energy: float) -> None:
    adapter = make(make_adapter)
    report = loratool.truncate(adapter, tmp_path / "out", energy=energy)
    for module in report.modules:
        squares = torch.linalg.svdvals(dense_deltas(adapter)[module.module]).square()
        kept = squares.cumsum(0) / squares.sum()
        assert module.rank == int((kept < energy * (1 - 1e-12)).sum()) + 1


@pytest.mark.slow
def test_a_budget_is_kept_and_well_spent(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make(make_adapter)
    whole = (adapter / "adapter_model.safetensors").stat().st_size
    for budget in range(whole // 3, whole, whole // 9):
        out = tmp_path / str(budget)
        report = loratool.truncate(adapter, out, max_size=budget)
        assert (out / "adapter_model.safetensors").stat().st_size <= budget
        found = {m.module: m.rank for m in report.modules}
        assert report.relative_error == pytest.approx(tails(adapter, found), rel=1e-6)
        metadata = loratool.open_adapter(out).metadata
        for ranks in itertools.product(range(7), repeat=3):
            tensors = {}
            for index, (name, k) in enumerate(zip(NAMES, ranks, strict=True)):
                if k:
                    tensors[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(k, 16)
                    up = torch.zeros(20 + 4 * index, k)
                    tensors[f"base_model.model.{name}.lora_B.weight"] = up
            if len(save(tensors, dict(metadata))) <= budget:
                option = dict(zip(NAMES, ranks, strict=True))
                assert tails(adapter, found) <= tails(adapter, option) * (1 + 1e-9)


def test_a_module_without_ranks_is_left_out_and_counted(make_adapter: Make, tmp_path: Path) -> None:
    tensors = {**lora("big", 16, 16), **{k: v * 1e-6 for k, v in lora("small", 16, 16).items()}}
    adapter = make_adapter(tensors, target_modules=["big", "small"])
    report = loratool.truncate(adapter, tmp_path / "out", max_size=1000)
    assert set(dense_deltas(tmp_path / "out")) == {"big"}
    assert load_config(tmp_path / "out")["target_modules"] == ["big"]
    assert ("small", "the budget leaves no rank for it") in report.plan.dropped
    assert {m.module: m.rank for m in report.modules}["small"] == 0
    truth = dense_deltas(adapter)
    assert report.relative_error == pytest.approx(
        relative_error(dense_deltas(tmp_path / "out"), truth), rel=1e-6
    )


def test_a_base_makes_errors_relative(
    make_adapter: Make, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter({**lora("a", 16, 16), **lora("b", 16, 16)}, target_modules=["a", "b"])
    base = make_base({"a.weight": torch.randn(16, 16) * 100, "b.weight": torch.randn(16, 16)})
    alone = loratool.truncate(adapter, tmp_path / "alone", max_size=1200)
    weighed = loratool.truncate(adapter, tmp_path / "weighed", max_size=1200, base=base)
    ranks = [{m.module: m.rank for m in report.modules} for report in (alone, weighed)]
    assert ranks[1]["b"] > ranks[0]["b"]
    with pytest.raises(OptionError, match="--max-size only"):
        loratool.truncate(adapter, tmp_path / "no", rank=2, base=base)


def test_multiples(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make(make_adapter)
    report = loratool.truncate(adapter, tmp_path / "up", max_error=0.3, rank_multiple=4)
    assert {m.rank for m in report.modules} == {4}
    report = loratool.truncate(adapter, tmp_path / "full", max_error=0.0, rank_multiple=4)
    assert {m.rank for m in report.modules} == {8}  # padded: the deltas have six
    assert report.relative_error < 1e-6
    report = loratool.truncate(adapter, tmp_path / "capped", rank=7, rank_multiple=4)
    assert {m.rank for m in report.modules} == {4}
    report = loratool.truncate(adapter, tmp_path / "size", max_size="3kB", rank_multiple=2)
    assert {m.rank % 2 for m in report.modules} == {0}


def test_a_dry_run_tells_what_then_happens(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make(make_adapter)
    for options in ({"rank": 2}, {"energy": 0.9}, {"max_size": "2kB"}):
        told = loratool.truncate(adapter, tmp_path / "out", dry_run=True, **options)
        assert not (tmp_path / "out").exists()
        done = loratool.truncate(adapter, tmp_path / "out", force=True, **options)
        assert told.plan.nbytes == done.plan.nbytes
        assert [m.rank for m in told.modules] == [m.rank for m in done.modules]
        assert told.relative_error == pytest.approx(done.relative_error, rel=1e-3)
        size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
        assert size == done.plan.nbytes
        loratool.rescale(tmp_path / "out", tmp_path / "moved", scale=1.0, force=True)
        import shutil

        shutil.rmtree(tmp_path / "out")


def test_attention_projections_share_a_rank(tmp_path: Path) -> None:
    report = loratool.truncate(FIXTURES / "adapters" / "mha", tmp_path / "out", max_error=0.4)
    ranks = {m.module: m.rank for m in report.modules if "attn" in m.module or "mha" in m.module}
    assert len(set(ranks.values())) == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("8MB", 8_000_000), ("1 KiB", 1024), ("1.5k", 1500), ("12", 12), (7, 7), ("2g", 2 * 10**9)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "8 XB", "-3", "1e3", "8iB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(OptionError):
        parse_size(text)


def test_nothing_asked_for_is_an_error(make_adapter: Make, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="say how far"):
        loratool.truncate(make(make_adapter), tmp_path / "out")


@pytest.mark.parametrize("kind", ["full", "loha", "lokr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_has_no_factors_is_truncated_too(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    shapes: dict[str, tuple[int, ...]] = {  # of the tensors of each
        "full": {"diff": (320, 320)},
        "loha": {f"hada_w{i}_{s}": (320, 4) if s == "a" else (4, 320) for i in "12" for s in "ab"},
        "lokr": {"lokr_w1": (4, 4), "lokr_w2": (80, 80)},
    }[kind]
    tensors = {f"{key}.{name}": torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    if kind != "full":
        tensors[f"{key}.alpha"] = torch.tensor(4.0)
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    wide = {name.rpartition(".")[2]: tensor.double() for name, tensor in tensors.items()}
    if kind == "full":
        delta = wide["diff"]
    elif kind == "loha":
        first, second = (wide[f"hada_w{i}_a"] @ wide[f"hada_w{i}_b"] for i in "12")
        delta = first * second
    else:
        delta = torch.kron(wide["lokr_w1"], wide["lokr_w2"])
    report = loratool.truncate(source, out, rank=8)
    made = load_file(out)
    up, down = (made[f"{key}.lora_{side}.weight"].double() for side in ("up", "down"))
    found = up @ down * float(made[f"{key}.alpha"]) / down.shape[0]
    assert down.shape[0] == 8 and report.modules[0].rank == 8
    error = float((found - delta).norm() / delta.norm())
    values = torch.linalg.svdvals(delta)
    assert report.relative_error == pytest.approx(error, rel=1e-3)
    assert error < 1.006 * float(values[8:].norm() / values.norm())
    planned = loratool.truncate(source, tmp_path / "planned", rank=8, dry_run=True)
    assert planned.relative_error == pytest.approx(error, rel=1e-3)
    assert not (tmp_path / "planned").exists()
    with pytest.raises(UnsupportedError, match="is "):
        loratool.truncate(source, tmp_path / "other.safetensors", max_error=0.1)


def test_a_spectrum_is_not_dropped_where_there_are_no_factors(tmp_path: Path) -> None:
    source, spectrum = tmp_path / "source.safetensors", tmp_path / "spectrum.json"
    save_file({"lora_unet_mid_block_attentions_0_proj_in.diff": torch.randn(40, 30)}, source)
    spectrum.write_text('{"schema": 1, "modules": []}')
    with pytest.raises(UnsupportedError, match="whole difference"):
        loratool.truncate(source, tmp_path / "out.safetensors", rank=4, spectrum=spectrum)
