"""A file that travels along with weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Sidecar", "write_sidecar"]


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A file that travels along.

    Attributes:
        name: Its path inside the output folder.
        source: The file to copy, or ``None``.
        content: The bytes to write where there is no source.
        why: Why it is not simply the base's file; empty if it is.
    """

    name: str
    source: Path | None
    content: bytes | None = None
    why: str = ""


def write_sidecar(sidecar: Sidecar, folder: Path) -> None:
    """Write a file into ``folder``, and the folders it lies in."""
    target = folder / sidecar.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if sidecar.source is None:
        target.write_bytes(sidecar.content or b"")
    else:
        shutil.copyfile(sidecar.source, target)
