"""What is in a folder of adapters, and what is one adapter or model as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratool.schemes.folders import is_collection, places


def make(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def names(root: Path, *, recursive: bool = False) -> list[str]:
    return [place.name for place in places([root], recursive=recursive)]


@pytest.mark.parametrize(
    "files",
    [
        ["adapter_config.json", "adapter_model.safetensors", "checkpoint-5/adapter_config.json"],
        ["style.safetensors", "preview.png", "README.md", "images/1.png"],
        ["config.json", "a.safetensors", "b.safetensors"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["model.safetensors.index.json", "x.safetensors", "y.safetensors"],
        ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"],
        [".metadata", "__0_0.distcp"],
        ["mp_rank_00/model_weights.ckpt", "mp_rank_01/model_weights.ckpt"],
    ],
)
def test_one_as_a_whole(tmp_path: Path, files: list[str]) -> None:
    assert not is_collection(make(tmp_path, *files))
    assert names(tmp_path) == [str(tmp_path)]


def test_a_folder_of_adapters(tmp_path: Path) -> None:
    make(
        tmp_path,
        *("b.safetensors", "a.pt", "a.png", "notes.txt", "optimizer.pt", ".hidden.safetensors"),
        *("peft/adapter_config.json", "deep/deeper/c.safetensors", ".cache/d.safetensors"),
    )
    assert is_collection(tmp_path)
    assert names(tmp_path) == ["a", "b", "peft"]
    assert names(tmp_path, recursive=True) == ["a", "b", "deep/deeper/c", "peft"]


def test_only_folders_of_adapters(tmp_path: Path) -> None:
    make(tmp_path, "a/adapter_config.json", "b/adapter_config.json")
    assert is_collection(tmp_path)
    assert names(tmp_path) == ["a", "b"]


def test_checkpoints_of_an_adapter(tmp_path: Path) -> None:
    make(tmp_path, "adapter_config.json", "checkpoint-5/adapter_config.json")
    assert names(tmp_path) == [str(tmp_path)]
    assert names(tmp_path, recursive=True) == [str(tmp_path), "checkpoint-5"]


def test_links_in_circles_end(tmp_path: Path) -> None:
    make(tmp_path, "a/x.safetensors", "a/y.safetensors")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert names(tmp_path, recursive=True) == ["a/x", "a/y"]


def test_nothing_of_the_kind(tmp_path: Path) -> None:
    make(tmp_path, "deep/deeper/c.safetensors", "deep/deeper/d.safetensors")
    (place,) = places([tmp_path])
    assert "holds no adapter and no model" in str(place.error)
    assert place.error is not None and "--recursive" in str(place.error.hint)
    assert names(tmp_path, recursive=True) == ["deep/deeper/c", "deep/deeper/d"]
    (missing,) = places([tmp_path / "nothing"])
    assert missing.error is None  # whoever opens it says so


def test_weights_and_their_settings_are_one_adapter(tmp_path: Path) -> None:
    """As a hook names both that a commit changes."""
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / name / file).touch()
            paths.append(tmp_path / name / file)
    settings, weights, alone, _ = paths
    found = [place.path for place in places([settings, weights, alone])]
    assert found == [weights, alone]
