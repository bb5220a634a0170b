"""What an output says of how it was made, and where what it was made of lies now.

Inputs are recorded by name and by digest, without the folders that they lay in: the same inputs
give the same bytes wherever they are. They are looked for by name, and taken only where the digest
is the recorded one.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.adapter.model import HISTORY_KEY
from loratool.base.model import open_model
from loratool.errors import (
    AdapterError,
    FileFormatError,
    LoratoolError,
    UnsupportedError,
    printable,
)
from loratool.files.containers import container_of, is_weights, open_weights
from loratool.files.hub.names import parse_hub_name
from loratool.files.json import parse_json, read_json_object
from loratool.files.missing import missing
from loratool.files.places import located
from loratool.plan.history import (
    RECORD_NAME,
    History,
    described_digest,
    digest_of,
    digest_of_all,
)
from loratool.schemes.detection import find_weights
from loratool.schemes.ranks import files_of

__all__ = ["Input", "Record", "is_recorded", "locate", "matches", "read_record"]

DEPTH: Final = 4
MOST_ENTRIES: Final = 20_000
"""How far around an input is looked for: a project, not a disk."""


@dataclass(frozen=True, slots=True)
class Input:
    """An input as it is recorded.

    Attributes:
        name: Its file or folder, without the path.
        sha256: Of the weights of an adapter; ``None`` where that is not recorded.
        headers_sha256: Of what the headers of a model say; ``None`` where that is not.
    """

    name: str
    sha256: str | None = None
    headers_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """How an output was made.

    Attributes:
        command: The command.
        version: The version that made it.
        inputs: What it was given, in order.
        options: What was asked for, by name as on the command line, with ``_`` for ``-``.
    """

    command: str
    version: str
    inputs: tuple[Input, ...]
    options: Mapping[str, Any]

    @property
    def version_line(self) -> str:
        """What made it, in a line."""
        return f"made by loratool {printable(self.version)}"


def read_record(path: Path) -> Record:
    """Return what the output at ``path`` says of how it was made.

    Raises:
        UnsupportedError: It says nothing.
        AdapterError: It is a folder in which nothing, or more than one thing, could.
        FileFormatError: What it says is damaged.
        MissingFileError: There is nothing at ``path``.
    """
    if not path.exists():
        raise missing(path)
    if path.is_dir() and (path / RECORD_NAME).is_file():
        return _parsed(read_json_object(path / RECORD_NAME), path / RECORD_NAME)
    text = _metadata(path).get(HISTORY_KEY)
    if text is None:
        raise UnsupportedError(path, "does not say how it was made", hint=_where_recorded(path))
    where = f"{path}: metadata {HISTORY_KEY!r}"
    return _parsed(parse_json(text.encode(), where=where), where)


def is_recorded(path: Path, history: History) -> bool:
    """Whether the output at ``path`` says that it was made so, of the same inputs.

    Raises:
        FileFormatError: An input cannot be hashed.
    """
    try:
        found = read_record(path)
    except LoratoolError:
        return False
    wanted = history.document({each: digest_of(each) for each in history.hashed})
    told = [(each.name, each.sha256, each.headers_sha256) for each in found.inputs]
    meant = [(e["name"], e.get("sha256"), e.get("headers_sha256")) for e in wanted["inputs"]]
    options = [json.dumps(each, sort_keys=True) for each in (found.options, wanted["options"])]
    return found.command == wanted["command"] and told == meant and options[0] == options[1]


def _where_recorded(path: Path) -> str:
    """Return where an output would say it, for one that does not."""
    if path.is_file() and not container_of(path).has_metadata:
        return (
            f"a single {path.suffix} file has no place for that; write a folder, which keeps it in "
            f"{RECORD_NAME}, or a .safetensors file"
        )
    return (
        "loratool records that in what it writes, but for single files of formats without metadata"
    )


def _metadata(path: Path) -> Mapping[str, str]:
    """Return what the weights at ``path`` say of themselves; nothing of a model in a folder.

    Raises:
        AdapterError: It is a folder with neither an adapter nor a model, or with several.
    """
    if path.is_dir():
        try:
            path, _ = find_weights(path)
        except AdapterError:
            try:
                open_model(path)
            except LoratoolError:
                pass
            else:
                return {}
            raise
    return open_weights(path).metadata


def _parsed(document: Any, where: object) -> Record:
    """Return a record that comes from a file, which anybody may have written."""
    try:
        command, version = document["command"], document["version"]
        options = document["options"]
        inputs = tuple(
            Input(each["name"], each.get("sha256"), each.get("headers_sha256"))
            for each in document["inputs"]
        )
    except (KeyError, TypeError, AttributeError):
        raise FileFormatError(where, "is no record of a command") from None
    texts = [command, version, *(each.name for each in inputs)]
    digests = [d for each in inputs for d in (each.sha256, each.headers_sha256) if d is not None]
    are_texts = all(isinstance(text, str) for text in (*texts, *digests))
    if not are_texts or not isinstance(options, dict):
        raise FileFormatError(where, "is no record of a command")
    return Record(command, version, inputs, options)


def locate(wanted: Input, around: Sequence[Path]) -> Path | None:
    """Return where an input lies in or below one of the folders ``around``, if it does.

    Raises:
        FileFormatError: Something lies there that is called so, and is another.
    """
    name = wanted.name
    if "/" in name and parse_hub_name(name) is not None:
        place = _on_the_hub(name)
        return place if place is not None and matches(wanted, place) else None
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return None
    other: Path | None = None
    for path in dict.fromkeys(found for root in around for found in _called(name, root)):
        if matches(wanted, path):
            return path
        other = other or path
    if other is not None:
        raise FileFormatError(
            other, "is called like the input that is recorded, and has other contents"
        )
    return None


def _on_the_hub(name: str) -> Path | None:
    """Return where a model of the hub is, in its cache or there."""
    try:
        place = located(f"hf://{name}")
    except LoratoolError:
        return None
    return place if place.exists() else None


def matches(wanted: Input, path: Path) -> bool:
    """Whether what lies at ``path`` has the recorded digest."""
    try:
        if wanted.sha256 is not None:
            return digest_of_all(files_of(find_weights(path)[0])) == wanted.sha256
        if wanted.headers_sha256 is not None:
            tensors = open_model(path).raw.values()
            return described_digest(each.spec for each in tensors) == wanted.headers_sha256
    except (LoratoolError, OSError):
        return False
    return path.is_dir() or is_weights(path) or path.suffix == ".json"


def _called(name: str, root: Path) -> Iterator[Path]:
    """Yield what is called ``name`` in or below ``root``, the nearest first."""
    folders = deque([(root, 0)])
    seen = 0
    while folders:
        folder, depth = folders.popleft()
        if os.path.lexists(folder / name):
            yield folder / name
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        seen += len(entries)
        if seen > MOST_ENTRIES or depth == DEPTH:
            continue
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                folders.append((folder / entry.name, depth + 1))
