"""Bases on disk: one file, shards, pickles, duplicates, and indexes that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratool.errors import BaseModelError, FileFormatError, LoratoolError
from loratool.files.checkpoint import open_checkpoint


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
    with pytest.raises(BaseModelError, match="no such"):
        open_checkpoint(tmp_path / "missing")


def test_a_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    save_file(
        {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(3)},
        folder / "model-00002-of-00002.safetensors",
    )
    with pytest.raises(BaseModelError, match="both in"):
        open_checkpoint(folder)
