"""Folders of adapters: what is in them, and what is an adapter or a model as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePath
from typing import Final

from loratool.errors import AdapterError, LoratoolError
from loratool.files.checkpoint import MODEL_CONFIG, PIPELINE_INDEX, PREFERRED, SHARD, is_index
from loratool.files.containers import is_weights
from loratool.files.foreign import foreign_folder
from loratool.files.places import located, origin_of
from loratool.schemes import sidecar_names, weights_names
from loratool.schemes.companions import is_training_state
from loratool.schemes.detection import distributed
from loratool.schemes.ranks import weights_of_ranks

__all__ = ["Place", "is_collection", "places"]

OF_MODELS: Final = frozenset((MODEL_CONFIG, PIPELINE_INDEX, *PREFERRED))
"""What tells that a folder is a model."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter or a model is.

    Attributes:
        path: File or folder.
        name: What it is called: its path inside the folder that was named, or as it was named.
        error: Why there is none.
    """

    path: Path
    name: str
    error: LoratoolError | None = None


def is_collection(path: Path) -> bool:
    """Whether a path is a folder of adapters, and not an adapter or a model by itself."""
    inside = _Folder.of(path)
    return bool(inside.weights or inside.folders) and not inside.what()


def places(paths: Sequence[str | PathLike[str]], *, recursive: bool = False) -> Iterator[Place]:
    """Yield every adapter or model at some paths, in the order of their names.

    A folder that is an adapter or a model is one; of any other each weights file in it is one,
    and each folder that is. Hidden ones are left out, and links that lead back. A path with
    nothing at it is one, and so is a folder with nothing of the kind, which says so. A file of
    settings whose weights are named too is none of its own.

    Args:
        paths: Files and folders.
        recursive: Look into all folders, and into those of adapters too, for checkpoints.
    """
    with_weights = {PurePath(each).parent for each in paths if is_weights(PurePath(each))}
    for each in paths:
        if PurePath(each).name in sidecar_names() and PurePath(each).parent in with_weights:
            continue
        try:
            path = located(each)
        except LoratoolError as error:
            yield Place(Path(each), str(each), error)
            continue
        if not path.is_dir():
            yield Place(path, str(each))
            continue
        found, seen = False, set[tuple[int, int]]()
        for place in _inside(path, recursive, seen, is_top=True):
            found = True
            yield Place(place, _name(place, path))
        if not found:
            yield Place(path, str(each), _empty(path, recursive))


def _name(place: Path, root: Path) -> str:
    """Return what a place is called inside the folder that was named."""
    if place == root:
        return str(origin_of(root) or root)
    inside = place.relative_to(root)
    return str(inside.with_suffix("") if is_weights(inside) and place.is_file() else inside)


def _empty(path: Path, recursive: bool) -> AdapterError:
    is_deeper = bool(_Folder.of(path).folders) and not recursive
    hint = "--recursive looks into the folders in it" if is_deeper else None
    return AdapterError(path, "holds no adapter and no model", hint=hint)


def _inside(
    folder: Path, recursive: bool, seen: set[tuple[int, int]], *, is_top: bool
) -> Iterator[Path]:
    try:
        status = folder.stat()
    except OSError:
        return
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    inside = _Folder.of(folder)
    what = inside.what(is_alone=is_top or not recursive)
    if what:
        yield folder
    else:
        yield from inside.weights
    if what == "model" or not (recursive or (is_top and not what)):
        return
    for each in inside.folders:
        yield from _inside(each, recursive, seen, is_top=False)


@dataclass(frozen=True, slots=True)
class _Folder:
    """What is in a folder and not hidden, in the order of names.

    Attributes:
        path: The folder.
        names: Everything.
        weights: Weights files, but for what only resuming a training needs.
        folders: Folders.
    """

    path: Path
    names: frozenset[str]
    weights: tuple[Path, ...]
    folders: tuple[Path, ...]

    @staticmethod
    def of(path: Path) -> _Folder:
        """Look into a folder; one that may not be read is empty."""
        try:
            with os.scandir(path) as found:
                entries = sorted((e for e in found if e.name[0] != "."), key=lambda e: e.name)
        except OSError:
            entries = []
        files = (path / e.name for e in entries if is_weights(PurePath(e.name)) and e.is_file())
        return _Folder(
            path,
            frozenset(entry.name for entry in entries),
            tuple(file for file in files if not is_training_state(file)),
            tuple(path / entry.name for entry in entries if entry.is_dir()),
        )

    def what(self, *, is_alone: bool = True) -> str:
        """Return ``adapter`` or ``model`` where it is one as a whole, else an empty text.

        Args:
            is_alone: Whether the only weights file, if no folder in it has such, is the adapter.
        """
        if not self.names.isdisjoint((*sidecar_names(), *weights_names())):
            return "adapter"
        if not self.names.isdisjoint(OF_MODELS) or any(map(is_index, self.names)):
            return "model"
        if distributed(self.path) is not None or weights_of_ranks(self.path) is not None:
            return "model"  # or an adapter: in either case in many files
        if self.weights and all(SHARD.fullmatch(file.name) for file in self.weights):
            return "model"
        if len(self.weights) == 1 and is_alone:
            return "" if any(_Folder.of(each).weights for each in self.folders) else "adapter"
        return "model" if not self.weights and foreign_folder(self.path) is not None else ""
