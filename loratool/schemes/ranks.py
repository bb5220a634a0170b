"""Adapters that tensor-parallel processes wrote, each its part in a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from loratool.adapter.scheme import Scheme
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.container import WeightsFile
from loratool.files.containers import is_weights, open_weights
from loratool.files.spec import StoredTensor
from loratool.files.yaml import read_flat_yaml
from loratool.schemes.companions import is_training_state

__all__ = ["Ranks", "files_of", "joined", "ranks_around", "weights_of_ranks"]

RANK: Final = re.compile(
    r"mp_rank_(?P<rank>\d{2,4})(_(?P<stage>\d{3}))?(_(?P<expert>\d{3}))?"
    r"|tp_rank_(?P<tp>\d{2,4})_pp_rank_(?P<pp>\d{3})",
    re.ASCII,
)
MODEL: Final = "model_config.yaml"
SIZE: Final = "tensor_model_parallel_size"


@dataclass(frozen=True, slots=True)
class Ranks:
    """The parts of one adapter.

    Attributes:
        folder: Where their folders lie.
        files: The weights of each rank, in their order.
    """

    folder: Path
    files: tuple[Path, ...]


def weights_of_ranks(folder: Path) -> Path | None:
    """Return the weights of the first rank, where a folder holds folders of ranks."""
    found = _members(folder)
    return _weights(found[0][2]) if found else None


def ranks_around(weights: Path) -> Ranks | None:
    """Return all parts of the adapter that a file is one of; ``None`` where it is whole.

    Raises:
        AdapterError: Some are missing.
        UnsupportedError: Layers are spread over pipeline stages too.
    """
    if RANK.fullmatch(weights.parent.name) is None:
        return None
    folder = weights.parent.parent
    members = _members(folder)
    ranks = sorted({rank for rank, _, _ in members})
    stages = sorted({stage for _, stage, _ in members})
    said = folder / MODEL
    size = read_flat_yaml(said).get(SIZE) if said.is_file() else None
    count = max(ranks[-1] + 1, size if type(size) is int and size < 1 << 12 else 0)
    missing = [str(rank) for rank in range(count) if rank not in ranks]
    if missing:
        (mine,) = (rank for rank, _, path in members if path == weights.parent)
        raise AdapterError(
            folder,
            f"{weights.parent.name} is tensor-parallel rank {mine} of {count}, and the parts of "
            f"rank {', '.join(missing[:8])} are missing",
            hint="copy the folders of all ranks beside each other",
        )
    if len(stages) > 1:
        raise UnsupportedError(
            folder,
            f"holds {len(stages)} pipeline stages, each of which numbers its layers from 0",
            hint="save it with one pipeline stage, or export it to Hugging Face's format with "
            "NeMo or Megatron-Bridge, and name what that writes",
        )
    if len(members) > len(ranks):
        raise UnsupportedError(
            folder,
            "holds several expert-parallel ranks, each of which numbers its experts from 0",
            hint="export it to Hugging Face's format with NeMo or Megatron-Bridge, and name what "
            "that writes",
        )
    if count == 1:
        return None
    return Ranks(folder, tuple(_weights(path) for _, _, path in members))


def files_of(weights: Path) -> list[Path]:
    """Return all files of an adapter that one of its weights files stands for, that one first.

    Raises:
        AdapterError: Ranks are missing.
        FileFormatError: The file, or one that it names, breaks a rule of its format.
    """
    ranks = ranks_around(weights)
    parts = [weights, *(path for path in ranks.files if path != weights)] if ranks else [weights]
    return [path for part in parts for path in open_weights(part).stamps]


def joined(ranks: Ranks, scheme: Scheme, file: WeightsFile) -> WeightsFile:
    """Return the file of an adapter whose tensors are those of all ranks together.

    Raises:
        AdapterError: The ranks hold different tensors, or ones that do not fit.
        UnsupportedError: The scheme is no tensor-parallel tool's.
    """
    if scheme.join is None:
        raise UnsupportedError(
            ranks.folder,
            f"is sharded over {len(ranks.files)} tensor-parallel ranks, and how, the scheme "
            f"{scheme.name!r} does not tell",
            hint="join it with the tool that wrote it, and name what that writes",
        )
    files = [file if path == file.path else open_weights(path) for path in ranks.files]
    for other in files[1:]:
        if other.tensors.keys() != files[0].tensors.keys():
            differing = sorted(other.tensors.keys() ^ files[0].tensors.keys())
            raise AdapterError(
                other.path, f"holds other tensors than rank 0, such as {differing[0]!r}"
            )
    tensors: dict[str, StoredTensor] = {
        name: scheme.join(name, [each.tensors[name] for each in files]) for name in file.tensors
    }
    note = f"gathered from {len(files)} tensor-parallel ranks"
    stamps = {path: stamp for each in files for path, stamp in each.stamps.items()}
    others = {path: stamp for path, stamp in stamps.items() if path != file.path}
    return replace(file, tensors=tensors, notes=(*file.notes, note), others=others)


def _members(folder: Path) -> list[tuple[int, int, Path]]:
    """Return the rank, the pipeline stage and the path of each folder of a rank, in order."""
    found: list[tuple[int, int, Path]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = RANK.fullmatch(path.name)
        if match is not None and path.is_dir():
            rank, stage = match["rank"] or match["tp"], match["stage"] or match["pp"] or "0"
            found.append((int(rank), int(stage), path))
    return sorted(found)


def _weights(folder: Path) -> Path:
    """Return the weights file of one rank.

    Raises:
        AdapterError: There is none, or more than one.
    """
    found: Sequence[Path] = sorted(
        path for path in folder.iterdir() if is_weights(path) and not is_training_state(path)
    )
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:4]) or "none"
        raise AdapterError(folder, f"expected one weights file of this rank, found {names}")
    return found[0]
