"""``inspect`` and ``validate`` of many paths: rows, documents, lines, what cannot be read."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from samples import FIXTURES, lora

import loratool
from loratool.cli.main import cli
from loratool.errors import LoratoolError, OptionError

BASE = FIXTURES / "bases" / "llama-untied"
ONE = FIXTURES / "adapters" / "lora-linear"
BROKEN = FIXTURES / "adapters" / "factor-missing"


def run(*arguments: object) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli, words, standalone_mode=False, catch_exceptions=False)


def refusal(*arguments: object) -> OptionError:
    with pytest.raises(OptionError) as error:
        run(*arguments)
    return error.value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with adapters as files and folders, a model, and what is damaged."""
    root = tmp_path / "loras"
    root.mkdir()
    metadata = {"modelspec.trigger_phrase": "red, hat", "ss_sd_model_name": "sd15"}
    save_file(lora("model.layers.0.q_proj", 6, 5, 8), root / "big.safetensors", metadata=metadata)
    save_file(lora("model.layers.0.q_proj", 6, 5, 2), root / "small.safetensors")
    (root / "damaged.safetensors").write_bytes(b"no tensors")
    shutil.copytree(ONE, root / "peft")
    shutil.copytree(BASE, root / "deep" / "model")
    shutil.copytree(BROKEN, root / "deep" / "broken")
    return root


def test_a_folder_is_a_row_each(folder: Path) -> None:
    rows = loratool.inspect_many(folder).records()
    assert [row["name"] for row in rows] == ["big", "damaged", "small", "peft"]
    big, damaged, _, peft = rows
    assert (big["scheme"], big["rank"], big["alpha"], big["base"]) == (
        "module-path", 8, None, "sd15",
    )  # fmt: skip
    assert (big["triggers"], big["modules"], big["parameters"]) == (["red", "hat"], 1, 88)
    assert damaged["error"]["code"] == "LT000"
    assert (peft["scheme"], peft["rank"], peft["alpha"]) == ("peft", 2, 5.0)
    assert [row["kind"] for row in rows] == ["adapter", None, "adapter", "adapter"]


def test_folders_in_folders_are_looked_into_when_asked(folder: Path) -> None:
    rows = loratool.inspect_many([folder], recursive=True).records()
    found = {row["name"]: row["kind"] for row in rows}
    assert found["deep/model"] == "model" and found["deep/broken"] == "adapter"


def test_it_is_read_as_it_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    from loratool.verbs.inspection import many

    whole = many.inspect
    monkeypatch.setattr(
        many, "inspect", lambda path, **settings: opened.append(path) or whole(path, **settings)
    )
    items = iter(loratool.inspect_many(folder))
    next(items)
    assert len(opened) == 1
    assert isinstance(items, Iterator) and len(list(items)) == 3


def test_one_path_keeps_its_document_and_more_have_items(folder: Path) -> None:
    one = json.loads(run("inspect", ONE, "--json").output)
    assert one["kind"] == "adapter" and "items" not in one
    result = run("inspect", ONE, folder / "small.safetensors", "--json")
    assert result.return_value == 0
    document = json.loads(result.stdout)
    assert (document["schema"], document["items"][0]) == (1, one)
    assert json.loads(run("inspect", ONE, "--jsonl").output) == one


def test_lines_are_documents_and_errors_are_among_them(folder: Path) -> None:
    result = run("inspect", folder, "--jsonl")
    assert result.return_value == 1
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(document["schema"] == 1 for document in documents)
    assert documents[1]["path"] == str(folder / "damaged.safetensors")
    assert set(documents[1]["error"]) == {"code", "where", "message", "hint"}
    assert "1 of 4 could not be read" in result.stderr


def test_the_table_has_everything_and_says_what_was_not_read(folder: Path) -> None:
    result = run("inspect", folder, "--sort", "-rank")
    assert result.return_value == 1
    lines = [line.split()[0] for line in result.stdout.splitlines() if line]
    assert [name for name in lines if name in ("big", "small", "peft")] == ["big", "small", "peft"]
    assert "damaged" in result.stdout and "LT000" in result.stdout
    assert "3 adapters, 1 not read" in result.stdout


def test_rows_as_csv(folder: Path) -> None:
    result = run("inspect", folder, "--csv", "--sort", "size")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["name"] for row in rows] == ["small", "big", "peft", "damaged"]
    assert rows[1]["triggers"] == "red, hat" and rows[1]["rank"] == "8"
    assert rows[3]["error"].startswith("LT000 ")


def test_nothing_could_be_read(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "a", tmp_path / "b", "--json")
    assert result.return_value == 2
    document = json.loads(result.stdout)
    assert [item["error"]["code"] for item in document["items"]] == ["LT301"] * 2
    assert document["error"]["code"] == "LT301"
    assert document["error"]["message"].endswith("; none of 2 could be read")
    assert result.stderr.startswith(f"error: {tmp_path / 'a'}: no such file or folder")
    assert run("inspect", tmp_path / "a", ONE).return_value == 1
    assert run("inspect", tmp_path, "--recursive").return_value == 2


def test_what_is_about_one_path_is_refused(folder: Path) -> None:
    for options in (["--modules"], ["--plot", "x.png"]):
        assert "is about one path" in str(refusal("inspect", folder, *options))
    error = refusal("inspect", folder, "--sort", "ranks")
    assert "'ranks' is none of name" in str(error) and error.hint == "did you mean 'rank'?"
    both = refusal("inspect", folder, "--json", "--csv")
    assert str(both) == "--csv: not together with --json"


def test_an_adapter_of_a_folder_of_several_can_be_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(ONE, tmp_path / name)
    assert len(json.loads(run("inspect", tmp_path, "--json").stdout)["items"]) == 2
    document = json.loads(run("inspect", tmp_path, "--adapter-name", "b", "--json").stdout)
    assert document["kind"] == "adapter"


def duplicate_names(paths: Any) -> dict[str, str | None]:
    rows = loratool.inspect_many(paths, duplicates=True).records()
    return {row["name"]: row["duplicate_of"] and Path(row["duplicate_of"]).name for row in rows}


def test_the_same_content_under_any_name(tmp_path: Path) -> None:
    root = tmp_path / "all"
    root.mkdir()
    shutil.copytree(ONE, root / "a")
    shutil.copytree(ONE, root / "renamed")
    loratool.convert(ONE, "kohya", root / "kohya.safetensors")
    loratool.convert(ONE, "mlx", root / "turned")
    loratool.rescale(ONE, root / "half", scale=0.5)
    tensors = load_file(ONE / "adapter_model.safetensors")
    key = next(iter(tensors))
    shutil.copytree(ONE, root / "changed")
    save_file(tensors | {key: tensors[key] + 1}, root / "changed" / "adapter_model.safetensors")
    found = duplicate_names(root)
    assert {name for name, first in found.items() if first == "kohya.safetensors"} == {
        "a", "renamed", "turned",
    }  # fmt: skip
    assert all(found[name] is None for name in ("kohya", "half", "changed"))


def test_files_are_hashed_only_where_headers_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratool.verbs.inspection import content

    read: list[str] = []
    whole = content.read_view
    monkeypatch.setattr(
        content, "read_view", lambda tensor: read.append(tensor.path.name) or whole(tensor)
    )
    for name, rank in (("a", 2), ("b", 2), ("c", 3)):
        save_file(lora("m.layers.0.q", 6, 5, rank), tmp_path / f"{name}.safetensors")
    assert set(duplicate_names(tmp_path).values()) == {None}
    assert set(read) == {"a.safetensors", "b.safetensors"}


def test_hashes_are_columns(folder: Path) -> None:
    rows = loratool.inspect_many(folder, hashes=True).records()
    one = loratool.inspect(folder / "big.safetensors", hashes=True)
    assert rows[0]["sha256"] == one.hashes["sha256"]
    assert rows[0]["autov2"] == one.hashes["sha256"][:10]
    assert one.as_json()["hashes"] == one.hashes


def test_validate_is_a_row_each(folder: Path) -> None:
    rows = loratool.validate_many(folder, recursive=True).records()
    assert {row["name"]: row["ok"] for row in rows} == {
        "big": True, "damaged": False, "small": True, "peft": True, "deep/broken": False,
    }  # fmt: skip
    result = run("validate", folder, "--recursive", "--json")
    assert result.return_value == 1
    items = {Path(item["path"]).name: item for item in json.loads(result.stdout)["items"]}
    assert items["broken"]["findings"][0]["code"] == "LT001"
    assert items["broken"]["ok"] is False and "error" in items["damaged.safetensors"]
    assert "no adapters, left out: deep/model" in result.stderr


def test_validate_against_one_base_opens_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from loratool.verbs import validate

    opened: list[Path] = []
    whole = validate.open_model
    monkeypatch.setattr(validate, "open_model", lambda path: opened.append(path) or whole(path))
    found = list(loratool.validate_many([ONE, BROKEN], base=BASE))
    assert [item.findings.ok for item in found] == [True, False]
    assert opened == [BASE]
    assert found[1].findings == loratool.validate(BROKEN, base=BASE)


def test_validate_exits_with_what_it_found(tmp_path: Path) -> None:
    assert run("validate", ONE, ONE).return_value == 0
    assert run("validate", ONE, BROKEN).return_value == 1
    assert run("validate", ONE, tmp_path / "nothing").return_value == 1
    assert run("validate", tmp_path / "a", tmp_path / "b").return_value == 2
    lines = run("validate", ONE, BROKEN, "--jsonl").stdout.splitlines()
    assert [json.loads(line)["ok"] for line in lines] == [True, False]


def test_a_readme_is_not_dropped(tmp_path: Path) -> None:
    shutil.copytree(ONE, tmp_path / "a")
    for name in ("README.md", ".gitattributes"):
        (tmp_path / "a" / name).write_text("text")
    report = loratool.convert(tmp_path / "a", "kohya", tmp_path / "a.safetensors")
    assert report.plan.dropped == ()
    report = loratool.compose([tmp_path / "a", ONE], tmp_path / "sum", dry_run=True)
    assert report.plan.dropped == ()


def test_spectra_of_many(folder: Path) -> None:
    (found,) = loratool.inspect_many(folder / "small.safetensors", spectrum=True)
    assert not isinstance(found, LoratoolError)
    assert torch.tensor(found.spectra[0].singular_values).numel() == 2


def test_progress_counts_what_is_read(folder: Path) -> None:
    shutil.copy(folder / "big.safetensors", folder / "copy.safetensors")
    found = loratool.inspect_many(folder, duplicates=True)
    told: list[tuple[int, int]] = []
    rows = [dict(found.record(*pair)) for pair in found.pairs(lambda *args: told.append(args))]
    assert told == [(number, 5) for number in range(1, 6)]
    told.clear()
    rows = found.compared(rows, lambda *args: told.append(args))
    assert told == [(1, 2), (2, 2)]
    assert sum(row["duplicate_of"] is not None for row in rows) == 1
