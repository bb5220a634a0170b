"""Containers of weights, one file each. A new file with a ``CONTAINER`` in it is found.

Its ``CLAIM`` says by which suffixes it is known, and which of them weights of a model in a folder
have; where several kinds lie side by side, those of the higher ``preference`` are the model. Under
``splits`` it says which of them are parts that know each other by their names, so that one stands
for all. A container is imported when a file of it is met.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Final

from loratool.discovery import Plugins
from loratool.errors import FileFormatError
from loratool.files.foreign import foreign_bytes, foreign_file
from loratool.files.missing import missing
from loratool.files.sources import opened

if TYPE_CHECKING:
    from pathlib import Path

    from loratool.files.container import Container, WeightsFile

__all__ = ["USUAL", "container_of", "is_split", "is_weights", "model_suffixes", "open_weights"]

FILES: Final = Plugins(__name__, "CONTAINER")
USUAL: Final = ".safetensors"
"""What is written unless something else is asked for."""


def is_weights(path: PurePath) -> bool:
    """Whether a path is named like a weights file that can be read."""
    return _ending(path) in FILES.claimed("suffixes")


def _ending(path: PurePath) -> str:
    """Return the suffix of a path; a name that begins with its only dot is one."""
    return (path.suffix or (path.name if path.name.startswith(".") else "")).lower()


def is_split(path: PurePath) -> bool:
    """Whether one of several files of this name and numbers stands for all of them."""
    return path.suffix.lower() in FILES.claimed("splits")


def model_suffixes() -> tuple[str, ...]:
    """Return the suffixes of a model's weights in a folder, those that win first."""
    claims = FILES.claims().values()
    ranked = sorted(
        (-claim.get("preference", 0), suffix)
        for claim in claims
        for suffix in claim.get("models", ())
    )
    return tuple(suffix for _, suffix in ranked)


def container_of(path: PurePath | str) -> Container:
    """Return the container of files of this name, or of this suffix.

    Raises:
        FileFormatError: None has this suffix.
    """
    suffix = path if isinstance(path, str) else _ending(path)
    files = FILES.claimed("suffixes")
    if suffix.lower() not in files:
        known = ", ".join((*model_suffixes(), *(s for s in files if s not in model_suffixes())))
        raise FileFormatError(path, f"not a weights file: expected one of {known}")
    container: Container = FILES.load(files[suffix.lower()])
    return container


def open_weights(path: Path) -> WeightsFile:
    """Read the description of a weights file; its container is told by its ending.

    Raises:
        FileFormatError: The ending is unknown, or the file breaks its format's rules.
    """
    if not path.exists():
        raise missing(path, "no such file")
    if not path.is_file() and not path.is_dir():
        raise FileFormatError(path, "neither a file nor a folder")  # reading it may take for ever
    if not is_weights(path) and (known := foreign_file(path)) is not None:
        raise FileFormatError(path, f"this is {known.what}; it is not read", hint=known.hint)
    try:
        return container_of(path).open(path)
    except FileFormatError:
        other = foreign_bytes(_start(path))
        if other is None:
            raise
        raise FileFormatError(path, f"this is {other.what}; it is not read", hint=other.hint) from (
            None
        )


def _start(path: Path) -> bytes:
    try:
        with opened(path) as file:
            return file.read(512)
    except OSError:
        return b""
