"""A base model on disk: one file, or a folder with shards, an index and sidecars."""

from __future__ import annotations

import re
import reprlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from loratool.errors import BaseModelError, FileFormatError
from loratool.files.container import WeightsFile
from loratool.files.containers import is_split, is_weights, model_suffixes, open_weights
from loratool.files.foreign import foreign_folder
from loratool.files.json import read_json_object
from loratool.files.missing import missing
from loratool.files.spec import StoredTensor

__all__ = [
    "ADAPTER_CONFIG",
    "MODEL_CONFIG",
    "PIPELINE_INDEX",
    "PREFERRED",
    "SHARD",
    "Checkpoint",
    "is_index",
    "is_weight_like",
    "open_checkpoint",
]

INDEX: Final = re.compile(r".*\.index(\.[a-z0-9]+)?\.json", re.DOTALL)
"""Names of indices: those of a variant have its name in theirs (``….index.fp16.json``)."""
PREFERRED: Final = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.\w+")
"""Names of files that are parts of a model: the model's, which part, and of how many."""
IGNORED_STEMS: Final = (
    *("consolidated", "adapter_model", "training_args", "optimizer", "scheduler"),
    "mmproj",  # llama.cpp's projector of images, beside a language model
)
ADAPTER_CONFIG: Final = "adapter_config.json"
MODEL_CONFIG: Final = "config.json"
"""What lies beside weights. ``files`` asks whether there is one; ``base`` alone reads it."""
PIPELINE_INDEX: Final = "model_index.json"
"""What names the components of a pipeline, each in a folder of its own."""
MOST_FOLDERS: Final = 200
"""Entries of a folder without a model that are looked into for one, to name it."""
FOREIGN_SUFFIXES: Final = (".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".npz", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A base whose headers have been read and checked.

    Attributes:
        path: What the user named: a folder or a file.
        shards: The weights files in the order of their names, each with its tensors.
        index: The index file, where there is one.
        notes: What was found and not used, one sentence each.
    """

    path: Path
    shards: tuple[WeightsFile, ...]
    index: Path | None
    notes: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where the sidecars are."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors by name, shard by shard, each shard in the order of its data."""
        return {name: tensor for shard in self.shards for name, tensor in shard.tensors.items()}

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the first shard."""
        return self.shards[0].metadata

    @property
    def bytes(self) -> int:
        """Size of all weights files."""
        return sum(shard.size for shard in self.shards)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model: read every header, move no tensor data.

    A folder may hold ``model.safetensors``, shards with an index, or the ``.bin`` equivalents;
    safetensors win. ``consolidated.*`` files repeat the same weights and are left out. Any part of
    a GGUF file in several stands for all of them.

    Raises:
        BaseModelError: Nothing there is a model, shards are missing, or names repeat.
        FileFormatError: A file breaks the rules of its format.
    """
    if not path.exists():
        raise missing(path)
    if not path.is_file() and not path.is_dir():
        raise BaseModelError(path, "neither a file nor a folder")
    if path.is_file():
        if is_index(path.name):
            return _open_indexed(path.parent, path)
        match = SHARD.fullmatch(path.name)
        if match is not None and is_split(path):
            return _open_files(path, _parts(path, match))
        shards = (open_weights(path),)
        return Checkpoint(path, shards, None, _other(shards))
    for suffix in model_suffixes():
        indexes = sorted(
            index
            for index in path.glob(f"*{suffix}.index*.json")
            if is_index(index.name) and not index.name.startswith(IGNORED_STEMS)
        )
        plain = [index for index in indexes if index.name.endswith(f"{suffix}.index.json")]
        indexes = plain or indexes
        if len(indexes) > 1:
            raise BaseModelError(path, f"several indexes: {', '.join(i.name for i in indexes)}")
        if indexes:
            return _open_indexed(path, indexes[0])
        files = _weights_in(path, suffix)
        if files:
            return _open_files(path, files)
    foreign = foreign_folder(path)
    if foreign is not None:
        raise BaseModelError(path, f"this is {foreign.what}; it is not read", hint=foreign.hint)
    config = path / ADAPTER_CONFIG
    if config.is_file():
        raise BaseModelError(path, "is an adapter, not a model", hint=_model_hint(config))
    raise BaseModelError(
        path,
        "holds no model: expected model.safetensors, shards with an index, or pytorch_model.bin",
        hint=_nearby_hint(path),
    )


def is_index(name: str) -> bool:
    """Whether a file is called as the index of a checkpoint in shards."""
    return INDEX.fullmatch(name) is not None


def is_weight_like(path: Path) -> bool:
    """Whether a file in a model folder holds weights in any format, or points to such."""
    name = path.name
    return (
        is_weights(path)
        or path.suffix.lower() in FOREIGN_SUFFIXES
        or is_index(name)
        or name.startswith("consolidated.")
    )


def _model_hint(config: Path) -> str:
    """Return what is to be given instead of an adapter: the model that it says it is for."""
    order = "a BASE comes before the adapters"
    try:
        recorded = read_json_object(config).get("base_model_name_or_path")
    except FileFormatError:
        recorded = None
    if not isinstance(recorded, str) or not recorded:
        return f"give the model that it was trained on; {order}"
    return f"give the model that it was trained on, {recorded}; {order}"


def _nearby_hint(path: Path) -> str | None:
    """Return which folder in this one holds a model, where one does."""
    for folder in sorted(path.iterdir())[:MOST_FOLDERS]:
        is_model = any((folder / name).is_file() for name in PREFERRED)
        if is_model or next(folder.glob("*.index.json"), None) is not None:
            return f"name the folder in it: {shlex.quote(str(folder))}"
    return None


def _weights_in(folder: Path, suffix: str) -> list[Path]:
    files = sorted(
        file
        for file in folder.glob(f"*{suffix}")
        if not file.name.startswith(IGNORED_STEMS) and file.is_file()
    )
    for name in (*PREFERRED, f"model{suffix}"):
        if folder / name in files:
            return [folder / name]
    shards = [file for file in files if SHARD.fullmatch(file.name)]
    if shards and (len(shards) == len(files) or not is_split(shards[0])):
        return shards
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:6])
        raise BaseModelError(
            folder, f"several weights files and no index: {names}", hint="name one of the files"
        )
    return files or sorted(folder.glob(f"consolidated{suffix}"))


def _parts(path: Path, match: re.Match[str]) -> list[Path]:
    """Return the files beside ``path`` that are called like it and differ in their numbers."""
    found = ((file, SHARD.fullmatch(file.name)) for file in path.parent.glob(f"*{path.suffix}"))
    return sorted(file for file, m in found if m and (m[1], m[3]) == (match[1], match[3]))


def _open_files(folder: Path, files: list[Path]) -> Checkpoint:
    """Open what has no index: one file, or a complete set of numbered shards."""
    matches = [match for file in files if (match := SHARD.fullmatch(file.name))]
    if matches:
        families = {(match[1], match[3]) for match in matches}
        if len(families) > 1 or len(matches) != int(matches[0][3]):
            raise BaseModelError(
                folder,
                f"incomplete: {len(matches)} shards of {matches[0][3]}, and no index",
                hint="download the missing files",
            )
    shards = tuple(open_weights(file) for file in files)
    _check_unique(folder, shards)
    is_told = len(files) == 1 or is_split(files[0])
    notes = () if is_told else ("there is no index; all shards were read",)
    return Checkpoint(folder, shards, None, (*notes, *_other(shards)))


def _open_indexed(folder: Path, index: Path) -> Checkpoint:
    content = read_json_object(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError(index, "has no 'weight_map'")
    known: set[str] = set()
    for name, file in weight_map.items():
        if isinstance(file, str) and file in known:
            continue
        _check_shard_name(index, name, file)
        known.add(file)
    names = sorted(known)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise BaseModelError(
            folder,
            f"{len(absent)} of {len(names)} shards are missing: {', '.join(absent[:4])}",
            hint="download the missing files",
        )
    shards = tuple(open_weights(folder / name) for name in names)
    _check_unique(folder, shards)
    present: dict[str, str] = {}
    for shard in shards:
        present.update(dict.fromkeys(shard.tensors, shard.path.name))
    for name, file in weight_map.items():
        if present.get(name) != file:
            found = f"it is in {present[name]!r}" if name in present else "it is not there"
            raise FileFormatError(index, f"says that tensor {name!r} is in {file!r}; {found}")
    unlisted = [name for name in present if name not in weight_map]
    notes = (
        (f"{len(unlisted)} tensors are not in the index, such as {unlisted[0]!r}",)
        if unlisted
        else ()
    )
    return Checkpoint(folder, shards, index, (*notes, *_other(shards)))


def _check_shard_name(index: Path, name: str, file: Any) -> None:
    is_plain = isinstance(file, str) and Path(file).name == file and len(file) < 256
    if not is_plain or "\0" in file or file in ("", ".", ".."):
        raise FileFormatError(
            index,
            f"sends tensor {reprlib.repr(name)} to {reprlib.repr(file)}: expected the plain "
            "name of a file beside it",
        )
    if not is_weights(Path(file)):
        raise FileFormatError(index, f"sends tensor {name!r} to {file!r}, not a weights file")


def _other(shards: tuple[WeightsFile, ...]) -> tuple[str, ...]:
    """Return notes on what shards hold beside tensors."""
    return tuple(note for shard in shards for note in shard.notes)


def _check_unique(folder: Path, shards: tuple[WeightsFile, ...]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        file = shard.path.name
        for name in shard.tensors:
            if name in seen:
                raise BaseModelError(
                    folder, f"tensor {name!r} is both in {seen[name]!r} and {file!r}"
                )
            seen[name] = file
