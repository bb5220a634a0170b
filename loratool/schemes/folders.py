"""Folders of adapters: what is in them, and what is an adapter or a model as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Final

from loratool.errors import AdapterError
from loratool.files.checkpoint import PREFERRED, SHARD, is_index
from loratool.files.containers import is_weights
from loratool.files.foreign import foreign_folder
from loratool.schemes import sidecar_names, weights_names
from loratool.schemes.companions import is_training_state

__all__ = ["is_collection", "places"]

OF_MODELS: Final = frozenset(("config.json", "model_index.json", *PREFERRED))
"""What tells that a folder is a model."""


def is_collection(path: Path) -> bool:
    """Whether a path is a folder of adapters, and not an adapter or a model by itself."""
    return path.is_dir() and _what(path) == "" and bool(_files(path) or _folders(path))


def places(paths: Sequence[str | PathLike[str]], *, recursive: bool = False) -> Iterator[Path]:
    """Yield every adapter or model at some paths, in the order of their names.

    A folder that is an adapter or a model is one; of any other each weights file in it is one,
    and each folder that is. Hidden folders, and those that were seen already, are left out.

    Args:
        paths: Files and folders, whether they are there or not.
        recursive: Look into all folders, and into those of adapters too, for checkpoints.

    Raises:
        AdapterError: A folder holds nothing of that kind.
    """
    seen: set[Path] = set()
    for each in paths:
        path = Path(each)
        if not path.is_dir():
            yield path
            continue
        found = False
        for place in _inside(path, recursive, seen, is_top=True):
            found = True
            yield place
        if not found:
            deeper = bool(_folders(path)) and not recursive
            hint = "--recursive looks into the folders in it" if deeper else None
            raise AdapterError(path, "holds no adapter and no model", hint=hint)


def _inside(folder: Path, recursive: bool, seen: set[Path], *, is_top: bool) -> Iterator[Path]:
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    what = _what(folder, is_alone=is_top or not recursive)
    if what:
        yield folder
    else:
        yield from _files(folder)
    if what == "model" or not (is_top or recursive):
        return
    if what and not recursive:
        return
    for each in _folders(folder):
        yield from _inside(each, recursive, seen, is_top=False)


def _what(folder: Path, *, is_alone: bool = True) -> str:
    """Return ``adapter`` or ``model`` for a folder that is one, else an empty text.

    Args:
        folder: The folder.
        is_alone: Whether the only weights file of a folder without such folders is the adapter.
    """
    names = {entry.name for entry in _entries(folder)}
    if not names.isdisjoint({*sidecar_names(), *weights_names()}):
        return "adapter"
    if not names.isdisjoint(OF_MODELS) or any(map(is_index, names)):
        return "model"
    files = _files(folder)
    if files and all(SHARD.fullmatch(file.name) for file in files):
        return "model"
    if len(files) == 1 and is_alone and not _folders(folder):
        return "adapter"
    return "model" if not files and foreign_folder(folder) is not None else ""


def _files(folder: Path) -> list[Path]:
    return [
        entry
        for entry in _entries(folder)
        if is_weights(entry) and entry.is_file() and not is_training_state(entry)
    ]


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _entries(folder: Path) -> list[Path]:
    """Return what is in a folder and not hidden; nothing where it may not be read."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return []
