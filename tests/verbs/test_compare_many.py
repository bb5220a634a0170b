"""``compare`` of many adapters, with random matrices, and of the layers of one: dense float64."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from deltas import dense_deltas
from safetensors.torch import load_file, save_file
from samples import FIXTURES, lora

import loratool
from loratool.cli.main import cli
from loratool.errors import AdapterError, LoratoolError, OptionError
from loratool.files.spec import StoredTensor
from loratool.plan import host

Make = Callable[..., Path]
Q, K = "layers.0.q_proj", "layers.1.k_proj"


@pytest.fixture
def five(make_adapter: Make) -> list[Path]:
    """Two pairs that are alike, one of which nearly equal, and one with other modules."""
    made = []
    for pair in range(2):
        shared = {**lora(Q, 14, 9), **lora(K, 8, 9)}
        for index, noise in enumerate((0.0, (0.2, 1e-9)[pair])):
            kind = {"dtype": torch.float64}
            tensors = {
                key: value.to(**kind) + noise * torch.randn(value.shape, **kind)
                for key, value in shared.items()
            }
            made.append(make_adapter(tensors, f"{pair}{index}", target_modules=[Q, K]))
    return [*made, make_adapter(lora("layers.5.v_proj", 5, 9), "else", target_modules=["v_proj"])]


def as_vector(path: Path, names: list[str], sizes: dict[str, int]) -> np.ndarray:
    deltas = dense_deltas(path)
    return np.concatenate(
        [
            deltas[name].double().numpy().ravel() if name in deltas else np.zeros(sizes[name])
            for name in names
        ]
    )


def vectors(paths: list[Path]) -> list[np.ndarray]:
    sizes = {name: delta.numel() for path in paths for name, delta in dense_deltas(path).items()}
    return [as_vector(path, sorted(sizes), sizes) for path in paths]


def test_every_pair_is_that_of_dense_deltas(five: list[Path]) -> None:
    found = loratool.compare(five)
    truth = vectors(five)
    for i, j in itertools.product(range(5), repeat=2):
        one, other = truth[i], truth[j]
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert found.cosines[i][j] == pytest.approx(cosine, abs=1e-12)
        distance = np.linalg.norm(one - other)
        assert found.distances[i][j] == pytest.approx(distance, rel=1e-6, abs=1e-15)
    pairs = list(found.pairs)
    assert len(pairs) == 10
    # Two that differ by a billionth have their distance with its digits.
    (near,) = [p for p in pairs if (p.first, p.second) == (str(five[2]), str(five[3]))]
    alone = loratool.compare([five[2], five[3]])
    assert near.relative_distance == pytest.approx(alone.relative_distance, rel=1e-9)
    assert near.relative_distance is not None and near.relative_distance < 1e-8
    last = pairs[-1]
    assert (last.modules, last.only_in, last.cosine) == (0, (2, 1), 0.0)


def test_the_like_stand_side_by_side(five: list[Path]) -> None:
    shuffled = [five[place] for place in (0, 2, 4, 1, 3)]
    found = loratool.compare(shuffled)
    order = [Path(found.adapters[place]).name for place in found.order]
    for one, other in (("00", "01"), ("10", "11")):
        assert abs(order.index(one) - order.index(other)) == 1
    assert [joining.size for joining in found.clusters][-1] == 5
    assert found.clusters[0].distance == pytest.approx(0, abs=1e-9)


def test_the_document_has_an_item_for_each_pair(five: list[Path]) -> None:
    document = loratool.compare(five).as_json()
    assert len(document["items"]) == 10
    assert document["items"][0]["first"] == str(five[0])
    assert document["cosine"] == document["items"][0]["cosine"]
    records = loratool.compare(five).records()
    assert len(records) == 10
    assert all(not isinstance(v, (list, dict)) for r in records for v in r.values())
    two = loratool.compare(five[:2])
    assert "items" not in two.as_json()
    assert {r["module"] for r in two.records()} == {Q, K}
    assert {r["layer"] for r in two.records()} == {"0", "1"}


def test_what_cannot_be_read_is_told(five: list[Path], make_adapter: Make, tmp_path: Path) -> None:
    bad = make_adapter(lora(Q, 14, 9), "bad", target_modules=[Q])
    values = load_file(bad / "adapter_model.safetensors")
    first = next(iter(values))
    values[first][0, 0] = math.nan
    save_file(values, bad / "adapter_model.safetensors")
    found = loratool.compare([five[0], tmp_path / "nothing", bad, five[1]])
    assert found.adapters == (str(five[0]), str(five[1]))
    assert [path for path, _ in found.unread] == [str(tmp_path / "nothing"), str(bad)]
    assert "NaN" in found.unread[1][1]
    assert found.cosine == pytest.approx(loratool.compare(five[:2]).cosine)
    with pytest.raises(AdapterError, match="NaN"):
        loratool.compare([five[0], bad])
    with pytest.raises(LoratoolError):
        loratool.compare([five[0], tmp_path / "nothing", tmp_path / "neither"])


def test_adapters_of_different_models_have_no_cosine(five: list[Path], make_adapter: Make) -> None:
    larger = make_adapter(lora(Q, 28, 18), "larger", target_modules=[Q])
    found = loratool.compare([five[0], larger, five[1]])
    assert found.cosines[0][1] is None and found.distances[0][1] is None
    assert found.cosines[0][2] == pytest.approx(loratool.compare([five[0], five[1]]).cosine)
    assert any("larger" in note for note in found.notes)
    assert found.order[0] != 1 or found.order[2] != 1
    with pytest.raises(AdapterError):
        loratool.compare([five[0], larger])


def test_one_that_goes_with_all_does_not_join_what_does_not(
    five: list[Path], make_adapter: Make
) -> None:
    goes = make_adapter(lora("layers.7.q_proj", 14, 9), "goes", target_modules=["q_proj"])
    larger = make_adapter(lora(Q, 28, 18), "larger", target_modules=[Q])
    found = loratool.compare([goes, larger, five[0], five[1]])
    assert found.cosines[1][2] is None
    assert found.cosines[2][3] == pytest.approx(loratool.compare(five[:2]).cosine)


def test_one_whose_names_are_not_known_does_not_stop_the_rest(
    five: list[Path], tmp_path: Path
) -> None:
    flat = tmp_path / "positional.safetensors"
    factors = {"unet:0:down": torch.ones(2, 9), "unet:0:up": torch.ones(14, 2)}
    save_file(factors, flat, {"unet": '["Attention"]', "unet:0:rank": "2"})
    found = loratool.compare([flat, *five[:2]])
    assert found.adapters == (str(five[0]), str(five[1]))
    ((path, why),) = found.unread
    assert path == str(flat) and "numbers 1 modules" in why
    assert f"{flat}: {flat}" not in " ".join(found.document().notes)
    with pytest.raises(AdapterError):
        loratool.compare([flat, five[0]])


def test_every_factor_is_read_once(five: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[Path, str]] = []
    original = host.read_view

    def read(stored: StoredTensor) -> object:
        counted.append((stored.path, stored.spec.name))
        return original(stored)

    monkeypatch.setattr(host, "read_view", read)
    loratool.compare(five)
    assert len(counted) == len(set(counted)) == 2 * (4 * 2 + 1)


def test_results_do_not_depend_on_threads(five: list[Path]) -> None:
    one, other = (loratool.compare(five, threads=count) for count in (1, 3))
    assert one == other


# -------------------------------------------------------------- unequal ranks


@pytest.mark.parametrize(
    ("ranks", "directions", "shape"),
    [
        ((8, 64), None, (8, 64)),
        ((64, 8), None, (64, 8)),
        ((16, 64), None, (8, 64)),
        ((16, 16), None, (8, 8)),
        ((4, 8), None, (4, 8)),
        ((8, 64), 4, (4, 4)),
        ((8, 64), 20, (8, 20)),
    ],
)
def test_unequal_ranks_have_a_grid_that_is_not_square(
    make_adapter: Make, ranks: tuple[int, int], directions: int | None, shape: tuple[int, int]
) -> None:
    paths = [
        make_adapter(lora(Q, 96, 80, rank), f"r{place}", target_modules=[Q], r=rank)
        for place, rank in enumerate(ranks)
    ]
    (module,) = loratool.compare(paths, directions=directions).modules
    for grid, side in ((module.phi_left, 0), (module.phi_right, 2)):
        assert (len(grid), len(grid[0])) == shape
        one, other = (torch.linalg.svd(dense_deltas(path)[Q].double())[side] for path in paths)
        if side == 2:
            one, other = one.mT, other.mT
        for i, j in itertools.product(range(shape[0]), range(shape[1])):
            overlap = (one[:, : i + 1].mT @ other[:, : j + 1]).square().sum()
            assert grid[i][j] == pytest.approx(float(overlap) / (min(i, j) + 1), abs=1e-6)


# ------------------------------------------------------------------- by chance


def test_random_matrices_are_as_alike_as_expected(make_adapter: Make) -> None:
    path = make_adapter(lora(Q, 200, 160, 8), "one", target_modules=[Q], r=8)
    found = loratool.compare([path], random=3)
    assert found.adapters == (str(path), "random matrices (seed 3)")
    (module,) = found.modules
    assert module.baseline is not None
    assert module.norms[0] == pytest.approx(module.norms[1])
    assert module.subspace_similarity == module.baseline.random_similarity
    expected = (8 / 200 + 8 / 160) / 2
    assert module.baseline.expected_similarity == pytest.approx(expected)
    assert module.subspace_similarity == pytest.approx(expected, rel=0.5)
    assert module.baseline.expected_left[0][7] == pytest.approx(8 / 200)
    assert module.baseline.expected_right[2][1] == pytest.approx(3 / 160)
    assert found == loratool.compare([path], random=3)
    assert found != loratool.compare([path], random=4)


def test_two_adapters_are_set_against_chance(five: list[Path]) -> None:
    plain, found = loratool.compare(five[:2]), loratool.compare(five[:2], random=0)
    document = found.as_json()
    for module, same in zip(document["modules"], plain.as_json()["modules"], strict=True):
        assert {k: v for k, v in module.items() if k not in ("expected", "random")} == same
        assert module["expected"]["subspace_similarity"] < module["subspace_similarity"]
        grid = np.array(module["random"]["phi_left"])
        assert grid.shape == np.array(module["phi_left"]).shape
    assert {"expected_similarity", "random_similarity"} <= found.records()[0].keys()
    with pytest.raises(OptionError, match="one adapter or two"):
        loratool.compare(five, random=0)


# ---------------------------------------------------------------------- layers


def test_layers_of_one_kind_are_compared(make_adapter: Make) -> None:
    tensors = {
        **{
            key: value
            for layer, rank in ((0, 2), (2, 4), (10, 4))
            for key, value in lora(f"model.layers.{layer}.self_attn.q_proj", 14, 9, rank).items()
        },
        **lora("model.layers.0.mlp.up_proj", 20, 9),
    }
    path = make_adapter(
        tensors,
        "one",
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 2},
    )
    found = loratool.compare_layers(path)
    (kind,) = found.kinds
    assert (kind.kind, kind.shape, kind.layers) == ("self_attn.q_proj", (14, 9), ("0", "2", "10"))
    assert kind.directions == (2, 4, 4)
    assert found.alone == ("model.layers.0.mlp.up_proj",)
    truth = dense_deltas(path)
    for i, j in itertools.product(range(3), repeat=2):
        one, other = (torch.linalg.svd(truth[kind.modules[k]].double()) for k in (i, j))
        a, b = kind.directions[i], kind.directions[j]
        left = float((one[0][:, :a].mT @ other[0][:, :b]).square().sum()) / min(a, b)
        right = float((one[2][:a] @ other[2][:b].mT).square().sum()) / min(a, b)
        assert kind.left[i][j] == pytest.approx(left)
        assert kind.right[i][j] == pytest.approx(right)
    assert kind.expected == (pytest.approx(4 / 14), pytest.approx(4 / 9))
    assert len(found.records()) == 3
    fewer = loratool.compare_layers(path, directions=1).kinds[0]
    assert fewer.directions == (1, 1, 1)
    assert fewer.left[0][1] <= 1


@pytest.mark.parametrize("name", ["experts-gpt-oss", "conv", "mha", "dora-linear", "adalora"])
def test_layers_of_every_kind(name: str) -> None:
    found = loratool.compare_layers(FIXTURES / "adapters" / name)
    for kind in found.kinds:
        for row in (*kind.left, *kind.right):
            assert all(-1e-9 <= value <= 1 + 1e-9 for value in row)
    names = [module for kind in found.kinds for module in kind.modules]
    count = len(loratool.open_adapter(FIXTURES / "adapters" / name).sites)
    assert len({*names, *found.alone}) == count


# --------------------------------------------------------------- command line


def run(*arguments: object) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli, words, standalone_mode=False)


def test_a_folder_is_its_adapters(five: list[Path], tmp_path: Path) -> None:
    found = loratool.compare(tmp_path)
    assert sorted(found.adapters) == sorted(map(str, five))
    assert not found.is_pair
    (tmp_path / "inner").mkdir()
    five[4].rename(tmp_path / "inner" / "else")
    assert len(loratool.compare(tmp_path).adapters) == 4
    assert len(loratool.compare(tmp_path, recursive=True).adapters) == 5
    two = loratool.compare(five[:2], recursive=True)
    assert len(two.as_json()["items"]) == 1


def test_lines_and_rows_and_exit_statuses(five: list[Path], tmp_path: Path) -> None:
    lines = run("compare", *five, "--jsonl").stdout.splitlines()
    assert [json.loads(line)["schema"] for line in lines] == [1] * 10
    rows = list(csv.DictReader(io.StringIO(run("compare", *five, "--csv").stdout)))
    items = json.loads(run("compare", *five, "--json").stdout)["items"]
    for row, item in zip(rows, items, strict=True):
        assert (row["first"], row["second"]) == (item["first"], item["second"])
        assert float(row["cosine"]) == item["cosine"]
    assert run("compare", *five).return_value == 0
    some = run("compare", *five[:2], tmp_path / "nothing", "--json")
    assert some.return_value == 1
    assert json.loads(some.stdout)["unread"][0]["path"] == str(tmp_path / "nothing")
    assert isinstance(run("compare", five[0], tmp_path / "nothing").exception, LoratoolError)


def test_patterns_weigh_each_of_many(five: list[Path]) -> None:
    plain = loratool.compare(five[:3]).norms
    found = loratool.compare(five[:3], weights=["2:k_proj=0", "0.5"]).norms
    assert found[0] == pytest.approx(plain[0] / 2)
    assert found[1] < plain[1]
    assert found[2] == pytest.approx(plain[2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--layers",), "those of one adapter"),
        (("--random",), "one adapter or two"),
    ],
)
def test_options_that_do_not_fit(five: list[Path], options: tuple[str, ...], words: str) -> None:
    assert words in str(run("compare", *five, *options).exception)


def test_layers_on_a_terminal(five: list[Path], make_adapter: Make) -> None:
    tensors = {**lora("layers.0.q_proj", 14, 9), **lora("layers.1.q_proj", 14, 9)}
    path = make_adapter(tensors, "layered", target_modules=["q_proj"])
    text = run("compare", path, "--layers").stdout
    assert "q_proj" in text and "by chance" in text
    document = json.loads(run("compare", path, "--layers", "--json").stdout)
    assert document["kinds"][0]["layers"] == ["0", "1"]
    rows = list(csv.DictReader(io.StringIO(run("compare", path, "--layers", "--csv").stdout)))
    assert float(rows[0]["phi_left"]) == document["kinds"][0]["phi_left"][0][1]


def test_one_adapter_may_be_named_twice(five: list[Path]) -> None:
    found = loratool.compare([five[0], five[0], five[1]], weights=[1, -2])
    assert found.cosines[0][1] == pytest.approx(-1)
    assert [Path(path) for path in found.adapters] == [five[0], five[0], five[1]]
