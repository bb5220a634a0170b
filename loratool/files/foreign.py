"""Formats that are not read: what a file or folder is, and what makes of it one that is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from loratool.files.sources import opened

__all__ = ["Foreign", "foreign_bytes", "foreign_file", "foreign_folder", "part_of"]

FIRST: Final = 512
MOST_NAMES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Foreign:
    """Something that is not read.

    Attributes:
        what: What it is, as the end of a sentence.
        hint: What to do.
    """

    what: str
    hint: str | None = None


KERAS: Final = Foreign(
    "an HDF5 file, as Keras and KerasHub write",
    "its factors have no names of modules: load it with model.load_lora_weights, and save the "
    "model's weights for transformers",
)
NEMO: Final = Foreign(
    "a tar archive, as NeMo's .nemo files are",
    "unpack it (tar -xf FILE -C FOLDER) and name FOLDER/model_weights.ckpt",
)
FLAX: Final = Foreign("a MessagePack file, as Flax writes", "save it from PyTorch instead")
ONNX: Final = Foreign(
    "an ONNX model, whose graph holds the weights", "take the weights it was made from"
)
BYTES: Final[tuple[tuple[int, bytes, Foreign], ...]] = (
    (0, b"\x89HDF\r\n\x1a\n", KERAS),
    (257, b"ustar", NEMO),
    (0, b"\x1f\x8b", Foreign("a gzip archive", "unpack it first")),
    (0, b"BZh", Foreign("a bzip2 archive", "unpack it first")),
    (0, b"\xfd7zXZ\x00", Foreign("an xz archive", "unpack it first")),
    (0, b"\x28\xb5\x2f\xfd", Foreign("a Zstandard archive", "unpack it first")),
    (0, b"7z\xbc\xaf\x27\x1c", Foreign("a 7z archive", "unpack it first")),
    (0, b"Rar!\x1a\x07", Foreign("a RAR archive", "unpack it first")),
    (4, b"TFL3", Foreign("a TensorFlow Lite model", "take the weights it was made from")),
)
SUFFIXES: Final = {
    ".h5": KERAS,
    ".hdf5": KERAS,
    ".keras": Foreign(
        "a Keras model, whose weights have LoRA merged into them or beside them without names",
        "load it with Keras, and save the model's weights for transformers",
    ),
    ".nemo": NEMO,
    ".msgpack": FLAX,
    ".onnx": ONNX,
    ".distcp": Foreign(
        "one shard of a distributed checkpoint of PyTorch (DCP)",
        "name the folder that it lies in, with the other shards and .metadata",
    ),
    ".mlmodel": Foreign("a Core ML model", "take the weights it was made from"),
    ".orbax": Foreign(
        "a checkpoint of Orbax", "restore it with Orbax and save it with safetensors"
    ),
    ".index": Foreign("a TensorFlow checkpoint's index", "save it from PyTorch instead"),
    ".pkl": Foreign(
        "a plain pickle, which would have to be executed",
        "load it where you trust it, and save its tensors with safetensors",
    ),
}
PART: Final = re.compile(r".+[-_.](?P<part>\d{1,5})-of-(?P<count>\d{1,5})\..+")


def foreign_bytes(start: bytes) -> Foreign | None:
    """Return what a file is that begins with ``start``, if it is known."""
    return next((what for at, mark, what in BYTES if start[at:].startswith(mark)), None)


def foreign_file(path: Path) -> Foreign | None:
    """Return what a file is that is not read, by its content or its name."""
    try:
        with opened(path) as file:
            start = file.read(FIRST)
    except OSError:
        start = b""
    return foreign_bytes(start) or SUFFIXES.get(path.suffix.lower())


def foreign_folder(path: Path) -> Foreign | None:
    """Return what a folder is that holds no weights as they are read, if it is known."""
    try:
        names = [entry.name for entry, _ in zip(path.iterdir(), range(MOST_NAMES), strict=False)]
    except OSError:
        return None
    here = shlex.quote(str(path))
    for mark, made in FOLDERS:
        found = next((name for name in sorted(names) if mark.fullmatch(name)), None)
        if found is not None:
            return made(here, found)
    alone = [name for name in sorted(names) if Path(name).suffix.lower() in SUFFIXES]
    if alone:
        found_file = foreign_file(path / alone[0])
        if found_file is not None:
            return Foreign(f"the folder of {alone[0]}: {found_file.what}", found_file.hint)
    return None


def _dcp(here: str, name: str) -> Foreign:
    return Foreign(
        "a distributed checkpoint of PyTorch (DCP, as FSDP and torchtitan write it), of which "
        "adapters alone are read, and only beside their .metadata",
        f"join it first: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {here} "
        "OUT.pt",
    )


def _fsdp(here: str, name: str) -> Foreign:
    inner = f"{here}/{shlex.quote(name)}"
    return Foreign(
        "a checkpoint of FSDP, sharded over processes",
        f"name {inner}, where it holds an adapter, or join it first: accelerate merge-weights "
        f"{inner} OUT",
    )


def _zero(here: str, name: str) -> Foreign:
    return Foreign(
        "a checkpoint of DeepSpeed, sharded over processes (ZeRO)",
        f"join it first: python {here}/zero_to_fp32.py {here} OUT (DeepSpeed writes this script "
        "into the folder)",
    )


def _zero_step(here: str, name: str) -> Foreign:
    step = Path(shlex.split(here)[0]).resolve()
    run, tag = shlex.quote(str(step.parent)), shlex.quote(step.name)
    return replace(
        _zero(here, name),
        hint=f"join it first: python {run}/zero_to_fp32.py {run} OUT --tag {tag} (DeepSpeed writes "
        "this script there)",
    )


def _orbax(here: str, name: str) -> Foreign:
    return Foreign(
        "a checkpoint of Orbax (JAX: Tunix, MaxText, EasyDeL)",
        "restore it with Orbax and save its arrays with safetensors",
    )


FOLDERS: Final[tuple[tuple[re.Pattern[str], Callable[[str, str], Foreign]], ...]] = (
    (re.compile(r"pytorch_model_fsdp_\d+"), _fsdp),
    (re.compile(r"zero_to_fp32\.py|global_step\d+"), _zero),
    (re.compile(r"(bf16_)?zero_pp_rank_.*_optim_states\.pt"), _zero_step),
    (re.compile(r"_CHECKPOINT_METADATA|manifest\.ocdbt|ocdbt\.process_\d+"), _orbax),
    (re.compile(r"\.metadata|__\d+_\d+\.distcp"), _dcp),
)
"""What lies in a folder, and what it is then."""


def part_of(name: str) -> tuple[int, int] | None:
    """Return which part of how many a file is by its name, where it is one of several."""
    match = PART.fullmatch(name)
    part, count = (int(match["part"]), int(match["count"])) if match else (0, 0)
    return (part, count) if count > 1 else None
