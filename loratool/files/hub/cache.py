"""The local cache of the hub, searched without the network and without ``huggingface_hub``.

``models--org--name/refs/<revision>`` holds a commit, and ``snapshots/<commit>/`` the files of it
that somebody has fetched, which need not be all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.errors import FileFormatError
from loratool.files.checkpoint import ADAPTER_CONFIG, MODEL_CONFIG, PIPELINE_INDEX, SHARD, is_index
from loratool.files.containers import is_weights
from loratool.files.hub.names import HubName
from loratool.files.json import read_json_object

__all__ = [
    "COMMIT",
    "Snapshot",
    "absent_sidecars",
    "cache_folder",
    "cached",
    "is_offline",
    "is_sidecar",
    "missing_in",
    "snapshot_of",
]

COMMIT: Final = re.compile(r"[0-9a-f]{40}")
TRUE: Final = ("1", "ON", "YES", "TRUE")
SNAPSHOT: Final = re.compile(
    r".*/models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/(?P<inside>.*))?", re.DOTALL
)
OF_LIBRARIES: Final = re.compile(r"(model|pytorch_model|diffusion_pytorch_model)[-.].*")
"""Weights that have a ``config.json`` beside them."""
OF_ADAPTERS: Final = "adapter_model."
SIDECARS: Final = (
    *(".json", ".jinja", ".model", ".txt", ".tiktoken", ".yaml", ".yml"),
    *(
        ".py",
        ".md",
    ),  # code that a model needs, and its licence
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A commit of a model, as far as it is in the cache.

    Attributes:
        repo: ``org/name``.
        commit: The commit.
        folder: Where its files are.
        inside: A folder or file in it; empty for all of it.
    """

    repo: str
    commit: str
    folder: Path
    inside: str = ""

    @property
    def place(self) -> Path:
        """What is meant in it."""
        return self.folder / self.inside if self.inside else self.folder


def is_offline() -> bool:
    """Whether the environment forbids the network."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in TRUE


def cache_folder() -> Path:
    """Return the folder of the cache, as the environment says."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return _expanded(os.environ[variable])
    if os.environ.get("HF_HOME"):
        return _expanded(os.environ["HF_HOME"]) / "hub"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _expanded(home) / "huggingface" / "hub"


def _expanded(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser()


def cached(name: HubName) -> Snapshot | None:
    """Return what the cache has of a model; ``None`` where it knows no such commit."""
    store = cache_folder() / f"models--{name.repo.replace('/', '--')}"
    commit = name.revision or "main"
    if COMMIT.fullmatch(commit) is None:
        try:
            commit = (store / "refs" / commit).read_text("ascii")[:64].strip()
        except (OSError, ValueError):
            return None
    folder = store / "snapshots" / commit
    if COMMIT.fullmatch(commit) is None or not folder.is_dir():
        return None
    return Snapshot(name.repo, commit, folder, name.inside)


def snapshot_of(path: Path) -> Snapshot | None:
    """Return of which model and commit a path in a cache is, links not followed."""
    match = SNAPSHOT.fullmatch(str(path.absolute()))
    if match is None:
        return None
    inside = match["inside"] or ""
    folder = Path(str(path.absolute()).removesuffix(f"/{inside}") if inside else path.absolute())
    return Snapshot(match["repo"].replace("--", "/", 1), match["commit"], folder, inside)


def missing_in(snapshot: Snapshot) -> str | None:
    """Return what a snapshot lacks of what it means to be, as the end of a sentence.

    Returns:
        ``None`` where nothing is known to be missing that is needed to read it.
    """
    place = snapshot.place
    if not place.exists():
        return f"{snapshot.inside!r} is not there"
    lost = [*(_lost(place) if place.is_dir() else _lost_beside({place.name}, place.parent))]
    if lost:
        return f"it lacks {_words(lost)}"
    if place.is_file():
        return None
    return None if any(_weights_below(snapshot.place)) else "it has no weights"


def absent_sidecars(snapshot: Snapshot) -> list[str]:
    """Return the files of the commit that travel with weights and are not in the cache.

    Nothing is known of them where the cache has no list of the commit's files.
    """
    inside = f"{snapshot.inside}/" if snapshot.inside else ""
    return [
        name.removeprefix(inside)
        for name in _listed(snapshot)
        if name.startswith(inside)
        and is_sidecar(name.removeprefix(inside))
        and not (snapshot.folder / name).exists()
    ]


def is_sidecar(name: str) -> bool:
    """Whether a file at the top of a model is one that travels with its weights."""
    suffix = Path(name).suffix
    return "/" not in name and not name.startswith(".") and (not suffix or suffix in SIDECARS)


def _words(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _listed(snapshot: Snapshot) -> list[str]:
    """Return the files of the commit, where the cache has a list of them."""
    path = snapshot.folder.parent.parent / "trees" / f"{snapshot.commit}.json"
    try:
        said: Any = json.loads(path.read_bytes())
        return sorted(name for name in said["files"] if isinstance(name, str))
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _weights_below(folder: Path) -> Iterator[Path]:
    for pattern in ("*", "*/*"):
        yield from (path for path in folder.glob(pattern) if is_weights(path) and path.is_file())


def _lost(folder: Path) -> Iterator[str]:
    """Yield what files in a folder say that there should be, and is not."""
    names = {path.name for path in folder.iterdir() if path.exists()}
    for name in names:
        if is_index(name):
            yield from (file for file in _shards(folder / name) if file not in names)
        elif (match := SHARD.fullmatch(name)) is not None and is_weights(Path(name)):
            start, _, end = name.rpartition(f"-{match[2]}-of-")
            others = (f"{start}-{n:05}-of-{end}" for n in range(1, int(match[3]) + 1))
            yield from (other for other in others if other not in names)
    yield from _lost_beside(names, folder)
    if PIPELINE_INDEX in names:
        for part in _components(folder / PIPELINE_INDEX):
            if part not in names:
                yield f"{part}/"
            elif (folder / part / MODEL_CONFIG).exists():
                if not any(_weights_below(folder / part)):
                    yield f"the weights of {part}/"
                yield from (f"{part}/{each}" for each in _lost(folder / part))


def _lost_beside(names: Collection[str], folder: Path) -> Iterator[str]:
    """Yield the configurations that are missing beside weights."""
    needed = set()
    if any(OF_LIBRARIES.fullmatch(name) and is_weights(Path(name)) for name in names):
        needed.add(MODEL_CONFIG)
    if any(name.startswith(OF_ADAPTERS) for name in names):
        needed.add(ADAPTER_CONFIG)
    yield from (name for name in sorted(needed) if not (folder / name).exists())


def _shards(index: Path) -> Iterator[str]:
    try:
        said = read_json_object(index).get("weight_map")
    except FileFormatError:
        return
    if isinstance(said, dict):
        yield from sorted({file for file in said.values() if isinstance(file, str)})


def _components(index: Path) -> Iterator[str]:
    """Yield the folders of a pipeline."""
    try:
        said = read_json_object(index)
    except FileFormatError:
        return
    for name, kind in said.items():
        if not name.startswith("_") and isinstance(kind, list) and kind and kind[0] is not None:
            yield name
