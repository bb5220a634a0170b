"""``compare`` and ``inspect --spectrum`` against dense float64, and their pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from deltas import dense_deltas
from samples import FIXTURES, lora

import loratool
from loratool.cli.main import cli
from loratool.display.figures import sparkline
from loratool.errors import OptionError

Make = Callable[..., Path]
Q, V, K = "layers.0.q_proj", "layers.1.q_proj", "layers.1.k_proj"


@pytest.fixture
def two(make_adapter: Make) -> list[Path]:
    shared = lora(Q, 14, 9)
    near = {key: value + 0.3 * torch.randn_like(value) for key, value in shared.items()}
    one = make_adapter({**shared, **lora(V, 8, 9)}, "one", target_modules=[Q, V])
    other = make_adapter({**near, **lora(K, 5, 9)}, "other", target_modules=[Q, K])
    return [one, other]


def test_cosine_and_distance_are_those_of_dense_deltas(two: list[Path]) -> None:
    found = loratool.compare(two)
    one, other = (dense_deltas(path) for path in two)
    names = one.keys() | other.keys()
    zero = torch.zeros(()).double()
    product = sum(float((one[n] * other[n]).sum()) for n in one.keys() & other.keys())
    norms = [
        sum(float(d.square().sum()) for d in deltas.values()) ** 0.5 for deltas in (one, other)
    ]
    lost = sum(float((one.get(n, zero) - other.get(n, zero)).square().sum()) for n in names)
    assert found.cosine == pytest.approx(product / norms[0] / norms[1])
    assert found.relative_distance == pytest.approx(lost**0.5 / norms[0])
    assert list(found.norms) == pytest.approx(norms)
    assert found.only_in == ((V,), (K,))
    (module,) = found.modules
    assert module.cosine == pytest.approx(
        float((one[Q] * other[Q]).sum() / one[Q].norm() / other[Q].norm())
    )
    assert module.relative_distance == pytest.approx(
        float((one[Q] - other[Q]).norm() / one[Q].norm())
    )
    U, P = (torch.linalg.svd(deltas[Q])[0] for deltas in (one, other))
    W, R = (torch.linalg.svd(deltas[Q])[2].mT for deltas in (one, other))
    for i in range(4):
        for j in range(4):
            for phi, first, second in ((module.phi_left, U, P), (module.phi_right, W, R)):
                overlap = (first[:, : i + 1].mT @ second[:, : j + 1]).square().sum()
                assert phi[i][j] == pytest.approx(float(overlap) / (min(i, j) + 1))
    assert module.subspace_similarity == pytest.approx(
        (module.phi_left[3][3] + module.phi_right[3][3]) / 2
    )


def test_an_adapter_is_itself_and_its_rescaled_self(two: list[Path], tmp_path: Path) -> None:
    same = loratool.compare([two[0], two[0]])
    assert same.cosine == pytest.approx(1)
    assert same.relative_distance is not None and same.relative_distance < 1e-14
    loratool.rescale(two[0], tmp_path / "minus", scale=-1 - 1e-7)
    found = loratool.compare([two[0], tmp_path / "minus"])
    assert found.cosine == pytest.approx(-1)
    loratool.rescale(two[0], tmp_path / "near", scale=1 + 1e-9)
    found = loratool.compare([two[0], tmp_path / "near"])
    assert found.relative_distance == pytest.approx(1e-9, rel=1e-3)


def test_several_adapters_give_a_matrix(two: list[Path], make_adapter: Make) -> None:
    third = make_adapter(lora(Q, 14, 9), "third", target_modules=[Q])
    found = loratool.compare([*two, third])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pair = loratool.compare([[*two, third][i], [*two, third][j]])
        assert found.cosines[i][j] == pytest.approx(found.cosines[j][i])
        assert found.cosines[i][j] == pytest.approx(pair.cosine)
    assert [found.cosines[i][i] for i in range(3)] == [1.0] * 3
    assert found.modules == ()


def test_zero_deltas_have_no_cosine(two: list[Path], tmp_path: Path) -> None:
    loratool.rescale(two[0], tmp_path / "zero", scale=0)
    found = loratool.compare([tmp_path / "zero", two[1]])
    assert found.cosine is None and found.relative_distance is None
    document = json.loads(json.dumps(found.as_json()))
    assert document["modules"][0]["cosine"] is None


@pytest.mark.parametrize("name", ["experts-gpt-oss", "conv", "mha", "dora-linear", "adalora"])
def test_every_kind_is_compared(name: str) -> None:
    adapter = FIXTURES / "adapters" / name
    found = loratool.compare([adapter, adapter])
    assert found.cosine == pytest.approx(1)
    assert all(m.subspace_similarity == pytest.approx(1) for m in found.modules)


def test_options(two: list[Path]) -> None:
    with pytest.raises(OptionError, match="two adapters"):
        loratool.compare(two[:1])
    assert len(loratool.compare(two, directions=2).modules[0].phi_left) == 2


# ------------------------------------------------------------------ spectra


def test_spectra_are_those_of_dense_deltas(two: list[Path]) -> None:
    info = loratool.inspect(two[0], spectrum=True)
    document = info.as_json()
    truth = dense_deltas(two[0])
    for module in document["modules"]:
        values = torch.linalg.svdvals(truth[module["module"]])[:4]
        assert torch.allclose(torch.tensor(module["singular_values"]).double(), values)
        assert module["frobenius_norm"] == pytest.approx(float(values.norm()))
        assert module["spectral_norm"] == pytest.approx(float(values[0]))
        energy = values.square().cumsum(0) / values.square().sum()
        for key, share in (("rank_90", 0.9), ("rank_99", 0.99), ("rank_99_9", 0.999)):
            assert module[key] == int((energy < share).sum()) + 1
        assert 1 <= module["stable_rank"] <= module["effective_rank"] + 1e-9 <= 4 + 1e-6


def test_models_have_no_spectrum() -> None:
    with pytest.raises(OptionError, match="only adapters"):
        loratool.inspect(FIXTURES / "bases" / "llama-untied", spectrum=True)


def test_sparklines() -> None:
    assert sparkline([1.0, 1e-1, 1e-2, 1e-3, 0.0]) == "█▆▃▁▁"
    assert sparkline([]) == sparkline([0.0]) == ""
    assert len(sparkline([1.0] * 64)) == 16


# ----------------------------------------------------------------- pictures


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".html"])
def test_pictures(two: list[Path], make_adapter: Make, tmp_path: Path, suffix: str) -> None:
    evil = make_adapter(lora("layers.0.$\\frac{<script>", 6, 5), "evil")
    commands = (
        ("inspect", two[0]),
        ("inspect", evil),
        ("compare", *two),
        ("compare", *two, evil),
    )
    for number, command in enumerate(commands):
        file = tmp_path / f"{number}{suffix}"
        run(*command, "--plot", file)
        content = file.read_bytes()
        start = {
            ".pdf": b"%PDF",
            ".png": b"\x89PNG",
            ".svg": b"<?xml",
            ".html": b"<!doctype html>",
        }[suffix]
        assert content.startswith(start)
        assert b"<script" not in content
        again = tmp_path / f"again-{number}{suffix}"
        run(*command, "--plot", again)
        assert again.read_bytes() == content


def test_pictures_are_refused_before_any_work(two: list[Path], tmp_path: Path) -> None:
    kept = tmp_path / "kept.png"
    kept.write_text("mine")
    for file, words in ((tmp_path / "x.gif", "ends in none"), (kept, "exists already")):
        result = CliRunner().invoke(cli, ["inspect", str(two[0]), "--plot", str(file)])
        assert result.exit_code != 0
        assert words in str(result.exception)
    assert kept.read_text() == "mine"
