"""Bases on disk: one file, shards, pickles, duplicates, and indexes that lie."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratool.errors import BaseModelError, FileFormatError, LoratoolError
from loratool.files.checkpoint import open_checkpoint
from loratool.files.containers import container_of
from loratool.files.spec import TensorSpec


def sharded(folder: Path, **index: Any) -> Path:
    folder.mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a.weight": torch.ones(2, 2)}, folder / names[0], metadata={"format": "pt"})
    save_file({"b.weight": torch.ones(3)}, folder / names[1], metadata={"format": "pt"})
    weight_map = {"a.weight": names[0], "b.weight": names[1]} | index
    content = {"metadata": {"total_size": 28}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def test_shards_with_an_index(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "m"))
    assert list(checkpoint.tensors) == ["a.weight", "b.weight"]
    assert len(checkpoint.shards) == 2
    by_index = open_checkpoint(tmp_path / "m" / "model.safetensors.index.json")
    assert list(by_index.tensors) == ["a.weight", "b.weight"]


def test_shards_without_an_index_are_read_if_complete(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model.safetensors.index.json").unlink()
    assert list(open_checkpoint(folder).tensors) == ["a.weight", "b.weight"]
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BaseModelError, match="incomplete"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "place",
    ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "model.txt", 7, None],
)
def test_an_index_that_points_elsewhere_is_refused(place: Any, tmp_path: Path) -> None:
    save_file({"c.weight": torch.ones(1)}, tmp_path / "outside.safetensors")
    with pytest.raises(LoratoolError):
        open_checkpoint(sharded(tmp_path / "m", **{"c.weight": place}))


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    wrong = {
        "a.weight": "model-00002-of-00002.safetensors",
        "b.weight": "model-00001-of-00002.safetensors",
    }
    with pytest.raises(FileFormatError, match="it is in"):
        open_checkpoint(sharded(tmp_path / "m", **wrong))


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BaseModelError, match="model-00002-of-00002"):
        open_checkpoint(folder)


def test_safetensors_win_over_pickles_and_consolidated_copies(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    torch.save({"z.weight": torch.ones(1)}, folder / "pytorch_model.bin")
    save_file({"tok.weight": torch.ones(1)}, folder / "consolidated.safetensors")
    assert list(open_checkpoint(folder).tensors) == ["a.weight", "b.weight"]


def test_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="holds no model"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such"):
        open_checkpoint(tmp_path / "missing")


def test_a_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    save_file(
        {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(3)},
        folder / "model-00002-of-00002.safetensors",
    )
    with pytest.raises(BaseModelError, match="both in"):
        open_checkpoint(folder)


def gguf_file(path: Path, names: Sequence[str] = ("w",)) -> Path:
    """Write a GGUF file with a float of each name in it."""
    container = container_of(".gguf")
    specs = [TensorSpec(name, "F32", (1,)) for name in names]
    layout = container.lay_out(specs, {}, path.name)
    with path.open("w+b") as file:
        file.truncate(layout.size)
        layout.seal(file.fileno(), {}, path=path)
    return path


def test_any_part_of_a_gguf_file_stands_for_all(tmp_path: Path) -> None:
    paths = [
        gguf_file(tmp_path / f"x-{number:05}-of-00003.gguf", [f"w{number}"]) for number in (1, 2, 3)
    ]
    gguf_file(tmp_path / "mmproj-x.gguf")
    for path in (tmp_path, *paths):
        found = open_checkpoint(path)
        assert found.path == path and found.notes == ()
        assert [shard.path for shard in found.shards] == paths
        assert list(found.tensors) == ["w1", "w2", "w3"]
    gguf_file(tmp_path / "y-00001-of-00002.gguf")
    assert len(open_checkpoint(paths[0]).shards) == 3
    paths[1].unlink()
    for path in (paths[0], paths[2]):
        with pytest.raises(BaseModelError, match="2 shards of 00003"):
            open_checkpoint(path)


def test_gguf_files_are_a_folders_model_where_nothing_else_is(tmp_path: Path) -> None:
    one = gguf_file(tmp_path / "a.gguf")
    assert [shard.path for shard in open_checkpoint(tmp_path).shards] == [one]
    gguf_file(tmp_path / "a-00001-of-00001.gguf")
    with pytest.raises(BaseModelError, match=r"several weights files and no index: a-00001"):
        open_checkpoint(tmp_path)
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert [s.path.name for s in open_checkpoint(tmp_path).shards] == ["model.safetensors"]
