"""Which weights files a merge writes, how they are cut and named, and their indices."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final

from loratool.base.model import Model
from loratool.codecs.codec import claims
from loratool.errors import OutputError
from loratool.files.checkpoint import SHARD, Checkpoint
from loratool.files.container import WeightsFile
from loratool.files.containers import USUAL, container_of, is_weights
from loratool.files.json import read_json_object
from loratool.plan.history import History
from loratool.plan.model import OutputFile, Step
from loratool.plan.sidecar import Sidecar
from loratool.verbs.merging.coding import Placed

__all__ = ["indices", "keeps_container", "output_files", "writes_folder"]

AnyPath = str | PathLike[str]
LARGEST_SHARD: Final = 5_000_000_000
"""Bytes of a file that decoding makes larger than it was: what other tools cut models at."""


def writes_folder(model: Model, output: AnyPath | None) -> bool:
    """Whether the output is a folder, else the one weights file.

    Raises:
        OutputError: Its name is that of the other.
    """
    place = Path(output) if output is not None else Path()
    suffix = place.suffix
    if keeps_container(model):
        return _is_folder_like(model, output, place)
    if model.is_folder:
        if is_weights(place):
            raise OutputError(
                output, f"the base is a folder, so the output is one; leave out {suffix!r}"
            )
        return True
    if is_weights(place) and suffix.lower() != USUAL:
        raise OutputError(output, "only safetensors are written; end the name in .safetensors")
    return suffix != USUAL


def keeps_container(model: Model) -> bool:
    """Whether its files are written in their own format."""
    return all(container_of(shard.path).keeps_codes for shard in model.shards)


def _is_folder_like(model: Model, output: AnyPath | None, place: Path) -> bool:
    """Return the same for a base whose files are written in their own format."""
    suffix = model.shards[0].path.suffix
    if not is_weights(place):
        return True
    if place.suffix.lower() != suffix.lower():
        raise OutputError(
            output, f"the base is {suffix[1:].upper()}, so the output is: end the name in {suffix}"
        )
    if len(model.shards) > 1:
        raise OutputError(
            output,
            f"the base is in {len(model.shards)} files, so the output is a folder; leave out "
            f"{suffix!r}",
        )
    return False


def _output_name(path: Path) -> str:
    """Return the name of the file that a weights file becomes: safetensors, or its own format."""
    if path.suffix == ".safetensors" or container_of(path).keeps_codes:
        return path.name
    stem = path.stem.replace("pytorch_model", "model", 1) if _is_plain(path.stem) else path.stem
    return f"{stem}.safetensors"


def _is_plain(stem: str) -> bool:
    return stem.startswith("pytorch_model")


def output_files(
    view: Model,
    steps: Sequence[Placed],
    output: AnyPath | None,
    *,
    is_decoded: bool,
    history: History | None = None,
) -> list[OutputFile]:
    """Lay out the output: every tensor in the shard it came from, added ones in the last.

    Files that decoding has made too large are cut. ``history`` is what headers say of how they
    came to be.
    """
    lasts = {component: one.shards[-1].path for component, one in view.checkpoints.items()}
    by_shard: dict[Path, list[Step]] = {shard.path: [] for shard in view.shards}
    for step, path in steps:
        last = lasts.get("") or lasts[step.spec.name.partition(".")[0]]
        by_shard[path or last].append(step)
    about_codes = {key for claim in claims() for key in claim.metadata} if is_decoded else set()
    if about_codes:
        about_codes |= view.tensors.keys()  # what is said of a tensor is how it was stored
    files = []
    for component, checkpoint in view.checkpoints.items():
        folder, prefix = (f"{component}/", f"{component}.") if component else ("", "")
        contents: list[tuple[WeightsFile, list[Step]]] = []
        for shard in checkpoint.shards:
            mine = by_shard[shard.path]
            if not mine and shard.tensors:
                continue  # one with nothing but scales is gone
            is_cut = is_decoded and output is None and not keeps_container(view)
            contents += [(shard, part) for part in (_cut(mine) if is_cut else [mine])]
        names = _names(checkpoint, [shard for shard, _ in contents])
        for (shard, mine), name in zip(contents, names, strict=True):
            name = Path(output).name if output is not None else name
            metadata = {k: v for k, v in shard.metadata.items() if k not in about_codes}
            files.append(
                OutputFile.lay_out(f"{folder}{name}", mine, metadata, shard, prefix, history)
            )
    return files


def _cut(steps: list[Step]) -> list[list[Step]]:
    """Return the tensors of one file, in several where they are too large for one."""
    parts: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        if parts[-1] and size + step.spec.nbytes > LARGEST_SHARD:
            parts.append([])
            size = 0
        parts[-1].append(step)
        size += step.spec.nbytes
    return parts


def _names(checkpoint: Checkpoint, shards: Sequence[WeightsFile]) -> list[str]:
    """Return the names of the files that take the place of ``shards``.

    They are counted anew where some are cut, or where others are gone.
    """
    names = [_output_name(shard.path) for shard in shards]
    is_counted = bool(names) and SHARD.fullmatch(names[0]) is not None
    is_whole = len(names) == len(checkpoint.shards) or not is_counted
    if len(set(names)) == len(names) and is_whole:
        return names
    match = SHARD.fullmatch(names[0])
    stem = match[1] if match is not None else Path(names[0]).stem
    count = len(names)
    return [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def indices(model: Model, files: Sequence[OutputFile]) -> Iterator[Sidecar]:
    """Yield the index of each component that needs one."""
    for component, checkpoint in model.checkpoints.items():
        if model.config.is_inside:
            continue
        folder = f"{component}/" if component else ""
        mine = [file for file in files if not component or file.name.startswith(folder)]
        if len(mine) > 1 or checkpoint.index:
            yield _index(checkpoint, mine, component)


def _index(checkpoint: Checkpoint, files: Sequence[OutputFile], component: str) -> Sidecar:
    """Return the index of the output: the base's own bytes where nothing in it changes."""
    folder, prefix = (f"{component}/", f"{component}.") if component else ("", "")
    weight_map = {
        step.spec.name.removeprefix(prefix): file.name.removeprefix(folder)
        for file in files
        for step in file.steps
    }
    total = sum(step.spec.nbytes for file in files for step in file.steps)
    name = _index_of(files[0].name.removeprefix(folder))
    metadata: dict[str, Any] = {}
    if checkpoint.index is not None:
        content = read_json_object(checkpoint.index)
        name = _index_name(checkpoint.index)
        found = content.get("metadata")
        metadata = dict(found) if isinstance(found, dict) else {}
        if weight_map == content["weight_map"] and metadata.get("total_size") == total:
            return Sidecar(f"{folder}{name}", checkpoint.index)
    metadata["total_size"] = total
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(
            step.spec.elements for file in files for step in file.steps
        )
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return Sidecar(f"{folder}{name}", None, text.encode(), "describes the tensors as written")


def _index_of(name: str) -> str:
    """Return what the index of files is called whose first is called ``name``."""
    match = SHARD.fullmatch(name)
    return f"{match[1] if match is not None else 'model'}.safetensors.index.json"


def _index_name(path: Path) -> str:
    if ".safetensors." in path.name:
        return path.name
    return path.name.replace("pytorch_model", "model", 1).replace(".bin.", ".safetensors.")
