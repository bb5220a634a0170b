"""What pictures show of reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from samples import lora

import loratool
from loratool.reports.charts import Curves, Heat, charts_of
from loratool.verbs.inspect import AdapterInfo

Make = Callable[..., Path]


def charts(path: Path) -> tuple[Curves | Heat, ...]:
    info = loratool.inspect(path, spectrum=True)
    assert isinstance(info, AdapterInfo)
    return charts_of(info)


def test_layers_are_columns_and_kinds_are_rows(make_adapter: Make) -> None:
    names = [f"model.layers.{layer}.mlp.experts.{e}.up" for layer in (0, 2, 10) for e in (0, 1)]
    names += [f"model.layers.{layer}.self_attn.q" for layer in (0, 10)] + ["lm_head"]
    tensors = {key: value for name in names for key, value in lora(name, 12, 9).items()}
    path = make_adapter(tensors, "one", target_modules=["up", "q", "lm_head"])
    curves, norms, *_ = charts(path)
    assert isinstance(curves, Curves) and isinstance(norms, Heat)
    assert {curve.name for curve in curves.curves} == {
        "mlp.experts.up",
        "self_attn.q",
        "lm_head",
    }
    assert norms.columns == ("0", "2", "10", "-")
    assert set(norms.rows) == {"mlp.experts.up", "self_attn.q", "lm_head"}
    found = {r["module"]: r for r in loratool.inspect(path, spectrum=True).records()}
    both = [found[f"model.layers.2.mlp.experts.{e}.up"]["frobenius_norm"] for e in (0, 1)]
    row = norms.values[norms.rows.index("mlp.experts.up")]
    assert row[1] == pytest.approx(sum(both) / 2) and row[3] is None
    assert norms.values[norms.rows.index("self_attn.q")][1] is None


def test_shallow_modules_stand_where_what_they_hold_begins(make_adapter: Make) -> None:
    block = "unet.up_blocks.{}.attentions.0"
    names = [block.format(i) + ".proj_in" for i in (0, 1)]
    inside = ".transformer_blocks.{}.attn1.to_q"
    names += [block.format(i) + inside.format(j) for i in (0, 1) for j in (0, 1)]
    tensors = {key: value for name in names for key, value in lora(name, 12, 9).items()}
    norms = charts(make_adapter(tensors, "one", target_modules=["proj_in", "to_q"]))[1]
    assert isinstance(norms, Heat)
    assert norms.columns == ("1", "2", "3", "4")
    where = {
        row: [i for i, value in enumerate(values) if value is not None]
        for row, values in zip(norms.rows, norms.values, strict=True)
    }
    assert where == {"unet up proj_in": [0, 2], "unet up attn1.to_q": [0, 1, 2, 3]}


def test_unequal_ranks_have_a_grid_that_is_not_square(make_adapter: Make) -> None:
    paths = [
        make_adapter(lora("layers.0.q", 96, 80, rank), f"r{rank}", target_modules=["q"], r=rank)
        for rank in (8, 64)
    ]
    left = charts_of(loratool.compare(paths))[0]
    assert isinstance(left, Heat)
    assert (len(left.rows), len(left.columns)) == (8, 64)
    assert left.limits == (0.0, 1.0)
    assert (left.y, left.x) == ("i, of r8", "j, of r64")


def test_zero_has_pictures(make_adapter: Make, tmp_path: Path) -> None:
    path = make_adapter(lora("layers.0.q", 6, 5), "one", target_modules=["q"])
    loratool.rescale(path, tmp_path / "zero", scale=0)
    curves, norms, *_ = charts(tmp_path / "zero")
    assert isinstance(curves, Curves) and curves.curves == ()
    assert isinstance(norms, Heat) and norms.values == ((0.0,),)
    low, high = norms.limits
    assert low < high
    same = loratool.compare([tmp_path / "zero", tmp_path / "zero"])
    for chart in charts_of(same):
        assert isinstance(chart, Heat)


def test_values_of_rounding_are_not_drawn(make_adapter: Make) -> None:
    tensors = {key: torch.ones_like(value) for key, value in lora("a.q", 6, 5, 4).items()}
    info = loratool.inspect(make_adapter(tensors, target_modules=["q"]), spectrum=True)
    (curve,) = charts_of(info)[0].curves
    assert len(curve.mean) == 1
