"""A scheme is one file: every verb runs with one that no list knows.

It is transposed, spells modules in a way of its own, and keeps a strength for each module in a
configuration of its own. Truth is the delta in float64.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fakes.finding import FAKES, find_fakes
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import AdapterError, OutputError

MODULES = {"model.layers.0.self_attn.q_proj": (12, 8), "model.layers.1.mlp.up_proj": (20, 8)}
STRENGTHS = dict(zip(MODULES, (0.5, 3.0), strict=True))
RANK = 4
Deltas = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _with_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    find_fakes(monkeypatch)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """One in the scheme, written by hand."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {}
    for module, (out, into) in MODULES.items():
        name = module.replace(".", ":")
        tensors[f"{name}.turned_in"] = torch.randn(into, RANK)
        tensors[f"{name}.turned_out"] = torch.randn(RANK, out)
    save_file(tensors, folder / "turned.safetensors")
    strengths = {module.replace(".", ":"): factor for module, factor in STRENGTHS.items()}
    (folder / "turned.json").write_text(json.dumps({"strengths": strengths}))
    return folder


def deltas(folder: Path) -> Deltas:
    """What the files of the scheme say, read without loratool."""
    strengths = json.loads((folder / "turned.json").read_text())["strengths"]
    tensors = load_file(folder / "turned.safetensors")
    assert {name.rpartition(".")[0] for name in tensors} == set(strengths)
    found = {file.name for file in folder.iterdir()} - {"README.md"}
    assert found == {"turned.json", "turned.safetensors"}
    return {
        name.replace(":", "."): factor
        * (tensors[f"{name}.turned_in"].double() @ tensors[f"{name}.turned_out"].double()).T
        for name, factor in strengths.items()
    }


def peft_deltas(folder: Path) -> Deltas:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for module in MODULES:
        down, up = (
            tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB"
        )
        key = "^" + module.replace(".", r"\.")
        alpha = config["alpha_pattern"].get(key, config["lora_alpha"])
        found[module] = alpha / config["r"] * up @ down
    return found


def assert_equal(found: Deltas, wanted: Deltas, tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for module, delta in wanted.items():
        error = (found[module] - delta).norm() / delta.norm()
        assert error <= tolerance, (module, error)


def test_inspect(adapter: Path) -> None:
    found = loratool.inspect(adapter).as_json()
    assert found["scheme"] == "turned"
    assert {item["module"]: item["scale"] for item in found["modules"]} == STRENGTHS
    shapes = {m["module"]: (m["out_features"], m["in_features"]) for m in found["modules"]}
    assert shapes == MODULES


def test_inspect_the_file_of_settings(adapter: Path) -> None:
    assert loratool.inspect(adapter / "turned.json").as_json()["scheme"] == "turned"


def test_validate(adapter: Path) -> None:
    assert not [f for f in loratool.validate(adapter) if f.severity == "error"]


def test_settings_that_say_nothing_are_an_error(adapter: Path) -> None:
    (adapter / "turned.json").write_text("{}")
    with pytest.raises(AdapterError, match="has no strength for"):
        loratool.inspect(adapter)


def test_convert_from_and_to(adapter: Path, tmp_path: Path) -> None:
    loratool.convert(adapter, "peft", tmp_path / "peft")
    assert_equal(peft_deltas(tmp_path / "peft"), deltas(adapter))
    loratool.convert(tmp_path / "peft", "turned", tmp_path / "back")
    assert_equal(deltas(tmp_path / "back"), deltas(adapter))
    one, other = (load_file(f / "turned.safetensors") for f in (adapter, tmp_path / "back"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    with safe_open(tmp_path / "back" / "turned.safetensors", "pt") as file:
        assert file.metadata()["turned"] == str(len(MODULES))


def test_its_metadata_does_not_outlive_it(adapter: Path, tmp_path: Path) -> None:
    loratool.convert(adapter, "turned", tmp_path / "again")
    loratool.convert(tmp_path / "again", "module-path", tmp_path / "plain.safetensors")
    with safe_open(tmp_path / "plain.safetensors", "pt") as file:
        assert "turned" not in file.metadata()


def test_a_single_file_has_no_place_for_its_settings(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"turned\.json"):
        loratool.convert(adapter, "turned", tmp_path / "a.safetensors")


def test_folding(adapter: Path, tmp_path: Path) -> None:
    loratool.convert(adapter, "turned", tmp_path / "folded", fold=True)
    assert_equal(deltas(tmp_path / "folded"), deltas(adapter))
    strengths = json.loads((tmp_path / "folded" / "turned.json").read_text())["strengths"]
    assert set(strengths.values()) == {1.0}


@pytest.mark.parametrize("to", [None, "turned", "peft"])
def test_compose(to: str | None, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loratool.compose([adapter, adapter], out, weights=[2.0, -0.5], to=to)
    read = peft_deltas if to == "peft" else deltas
    assert_equal(read(out), {module: 1.5 * delta for module, delta in deltas(adapter).items()})


@pytest.mark.parametrize("budget", [{"rank": 2}, {"max_size": 1100}])
def test_truncate(budget: dict[str, int], adapter: Path, tmp_path: Path) -> None:
    report = loratool.truncate(adapter, tmp_path / "out", **budget)
    before, after = deltas(adapter), deltas(tmp_path / "out")
    lost = sum(float((after[m] - before[m]).norm() ** 2) for m in after)
    lost += sum(float(before[m].norm() ** 2) for m in before.keys() - after.keys())
    total = sum(float(delta.norm() ** 2) for delta in before.values())
    assert report.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    if "rank" in budget:
        for module, delta in before.items():
            left, values, right = torch.linalg.svd(delta)
            best = left[:, :2] * values[:2] @ right[:2]
            assert (after[module] - best).norm() <= 1e-5 * delta.norm()
    else:
        assert (tmp_path / "out" / "turned.safetensors").stat().st_size <= budget["max_size"]


def test_rescale(adapter: Path, tmp_path: Path) -> None:
    loratool.rescale(adapter, tmp_path / "out", scale=0.25)
    wanted = {module: 0.25 * delta for module, delta in deltas(adapter).items()}
    assert_equal(deltas(tmp_path / "out"), wanted)


def test_compare(adapter: Path, tmp_path: Path) -> None:
    loratool.convert(adapter, "kohya", tmp_path / "same.safetensors")
    found = loratool.compare([adapter, tmp_path / "same.safetensors"]).as_json()
    assert found["cosine"] == pytest.approx(1.0)
    assert found["relative_distance"] == pytest.approx(0.0, abs=1e-6)


def _base(make_base: Callable[..., Path], name: str = "base") -> Path:
    weights = {f"{module}.weight": torch.randn(*shape) for module, shape in MODULES.items()}
    return make_base(weights, {"model_type": "llama"}, name=name)


def test_merge(adapter: Path, make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = _base(make_base)
    loratool.merge(base, [adapter], tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "merged"))
    for module, delta in deltas(adapter).items():
        wanted = before[f"{module}.weight"].double() + delta
        assert (after[f"{module}.weight"] - wanted).abs().max() <= 1e-5


def test_extract(adapter: Path, make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = _base(make_base)
    loratool.merge(base, [adapter], tmp_path / "merged")
    dry = loratool.extract(
        base, tmp_path / "merged", tmp_path / "out", rank=4, to="turned", dry_run=True
    )
    assert [file["name"] for file in dry.as_json()["files"]] == [
        "turned.safetensors",
        "turned.json",
        "README.md",
    ]
    loratool.extract(base, tmp_path / "merged", tmp_path / "out", rank=4, to="turned")
    assert_equal(deltas(tmp_path / "out"), deltas(adapter), 1e-4)


def test_live(adapter: Path, tmp_path: Path) -> None:
    from loratool.live import attach

    model = torch.nn.Module()
    for module, (out, into) in MODULES.items():
        place = model
        *parents, leaf = module.split(".")
        for name in parents:
            if not hasattr(place, name):
                place.add_module(name, torch.nn.Module())
            place = getattr(place, name)
        place.add_module(leaf, torch.nn.Linear(into, out, bias=False))
    live = attach(model, adapter, name="one")
    live.save(tmp_path / "saved", to="turned")
    assert_equal(deltas(tmp_path / "saved"), deltas(adapter))


@pytest.mark.slow
def test_the_command_line(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATOOL_PLUGINS", str(FAKES))
    command = [sys.executable, "-m", "loratool"]
    out = tmp_path / "out"
    subprocess.run([*command, "convert", adapter, "--to", "turned", "-o", out], check=True)
    shown = subprocess.run(
        [*command, "inspect", out, "--json"], check=True, capture_output=True
    ).stdout
    assert json.loads(shown)["scheme"] == "turned"
