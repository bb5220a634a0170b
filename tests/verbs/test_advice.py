"""The advice of ``inspect --spectrum``: its ranks are those of dense float64, its commands run."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from deltas import dense_deltas
from safetensors.torch import load_file
from samples import FIXTURES, lora

import loratool
from loratool.cli.main import cli
from loratool.verbs.advice import Advice
from loratool.verbs.inspect import AdapterInfo

Make = Callable[..., Path]


def falling(module: str, out: int, into: int, rank: int, base: float) -> dict[str, torch.Tensor]:
    """Return factors whose singular values fall by a factor each."""
    tensors = lora(module, out, into, rank)
    for key, value in tensors.items():
        columns = value if "lora_B" in key else value.T
        columns[:] = torch.linalg.qr(columns)[0]
        if "lora_B" in key:
            value *= base ** -torch.arange(rank)
    return {key: value.contiguous() for key, value in tensors.items()}


@pytest.fixture
def mixed(make_adapter: Make) -> Path:
    tensors = {}
    for layer in range(3):
        tensors |= falling(f"model.layers.{layer}.self_attn.q_proj", 40, 30, 8, 2.0)
        tensors |= falling(f"model.layers.{layer}.self_attn.v_proj", 20, 30, 8, 1.2 + layer)
    return make_adapter(tensors, "mixed", target_modules=["q_proj", "v_proj"], r=8)


def spectral(path: Path) -> AdapterInfo:
    info = loratool.inspect(path, spectrum=True)
    assert isinstance(info, AdapterInfo)
    return info


def advice_of(path: Path) -> Advice:
    advice = spectral(path).advice
    assert advice is not None
    return advice


def enough(deltas: list[torch.Tensor], share: float) -> int:
    """Return the smallest rank at which the best approximations keep the share together."""
    squares = torch.stack([torch.linalg.svdvals(d.double())[:20] ** 2 for d in deltas]).sum(0)
    kept = squares.cumsum(0) / squares.sum()
    return int((kept < share - 1e-9).sum()) + 1


def test_ranks_are_those_of_dense_deltas(mixed: Path) -> None:
    advice, truth = advice_of(mixed), dense_deltas(mixed)
    shares = {"rank_90": 0.9, "rank_99": 0.99, "rank_99_9": 0.999}
    assert [kind.kind for kind in advice.kinds] == ["self_attn.q_proj", "self_attn.v_proj"]
    for kind in (*advice.kinds, advice.whole):
        deltas = [delta for name, delta in truth.items() if name.endswith(kind.kind)]
        assert (kind.modules, kind.rank) == (len(deltas), 8)
        assert kind.ranks == {name: enough(deltas, share) for name, share in shares.items()}


def check_commands(path: Path, advice: Advice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command, and compare what it writes with what was said."""
    monkeypatch.chdir(path.parent)
    before = loratool.open_adapter(path).weights.stat().st_size
    assert advice.savings
    for saving in advice.savings:
        words = shlex.split(saving.command)
        assert words[0] == "loratool"
        result = CliRunner().invoke(cli, [*words[1:], "--force", "--json"])
        assert result.exit_code == 0, result.output
        output = Path(words[words.index("-o") + 1])
        weights = loratool.open_adapter(output).weights
        assert weights.stat().st_size == saving.bytes
        assert before - weights.stat().st_size == saving.saved
        found = loratool.compare([path, output]).relative_distance
        assert found == pytest.approx(saving.relative_error, rel=0.01, abs=2e-3)


def test_commands_do_what_is_said(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = advice_of(mixed)
    kinds = [next(iter(saving.options)) for saving in advice.savings]
    assert kinds[:3] == ["energy"] * 3 and set(kinds[3:]) == {"rank"}
    check_commands(mixed, advice, monkeypatch)


@pytest.mark.parametrize("name", ["lora-linear", "conv", "experts-gpt-oss", "modules-to-save"])
def test_commands_for_every_kind(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "an adapter"
    path.symlink_to(FIXTURES / "adapters" / name)
    check_commands(path, advice_of(path), monkeypatch)


def test_commands_for_a_file(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one.safetensors"
    loratool.convert(mixed, "kohya", file)
    assert load_file(file)
    check_commands(file, advice_of(file), monkeypatch)


def test_what_is_not_truncated_says_why() -> None:
    advice = advice_of(FIXTURES / "adapters" / "dora-linear")
    assert advice.savings == () and advice.refusal is not None
    assert "DoRA" in advice.refusal
    assert advice.whole.ranks


def test_zero_has_no_advice(mixed: Path, tmp_path: Path) -> None:
    loratool.rescale(mixed, tmp_path / "zero", scale=0)
    assert spectral(tmp_path / "zero").advice is None


def test_it_is_the_end_of_what_is_shown(mixed: Path) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(mixed), "--spectrum"])
    lines = result.stdout.splitlines()
    assert lines[-1].startswith("loratool truncate ") and lines[-1].endswith("-o smaller")
    document = spectral(mixed).as_json()
    assert document["advice"]["all"]["modules"] == 6
    assert document["advice"]["truncate"][0]["options"] == {"energy": 0.9}


def flat(records: list[dict[str, Any]]) -> bool:
    return all(not isinstance(value, (list, dict)) for row in records for value in row.values())


def test_records_are_flat(mixed: Path, tmp_path: Path) -> None:
    rows = spectral(mixed).records()
    assert len(rows) == 6 and flat(rows)
    assert rows[0]["layer"] == "0" and rows[0]["layer_kind"] == "self_attn.q_proj"
    assert rows[0]["effective_rank"] > 1 and rows[0]["rank_99"] >= 1
    plain = loratool.inspect(mixed)
    assert isinstance(plain, AdapterInfo)
    assert "effective_rank" not in plain.records()[0]
    written = loratool.truncate(mixed, tmp_path / "out", rank=2).records()
    assert flat(written) and {row["rank"] for row in written} == {2}


def test_records_as_csv(mixed: Path) -> None:
    result = CliRunner().invoke(cli, ["compare", str(mixed), str(mixed), "--csv"])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["module"] for row in rows] == [m["module"] for m in spectral(mixed).records()]
    assert float(rows[0]["cosine"]) == pytest.approx(1)
