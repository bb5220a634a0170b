"""What to say of a path with nothing at it: what lies there under a similar name."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Final

from loratool.errors import MissingFileError

__all__ = ["missing", "nearest_path"]

NUMBER: Final = re.compile(r"[-+]?\d*\.?\d+")
MOST_NAMES: Final = 5000
"""Entries of a folder that are looked at; beyond them nobody waits for a guess."""


def missing(path: Path, what: str = "no such file or folder") -> MissingFileError:
    """Return the error for a path with nothing at it, with the nearest name that exists.

    Args:
        path: The path, as it was given.
        what: What was found instead of it.
    """
    if NUMBER.fullmatch(str(path)):
        return MissingFileError(path, what, hint=f"is it a weight? Give -w before each: -w {path}")
    near = nearest_path(path)
    if near is not None:
        return MissingFileError(path, what, hint=f"did you mean {shlex.quote(str(near))}?")
    if path.is_symlink():
        return MissingFileError(path, f"{what}: a link to {path.readlink()}")
    return MissingFileError(path, what)


def nearest_path(path: Path) -> Path | None:
    """Return the existing path that is spelled most like ``path``, if one is near."""
    rest: list[str] = []
    parent = path
    while not parent.exists() and parent.name:
        rest.insert(0, parent.name)
        parent = parent.parent
    found = parent
    for name in rest:
        near = _nearest(name, found)
        if near is None:
            return None
        found = found / near
    return found if rest else None


def _nearest(name: str, folder: Path) -> str | None:
    from difflib import get_close_matches

    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry, _ in zip(entries, range(MOST_NAMES), strict=False)]
    except OSError:
        return None
    if name in names:
        return name
    names = [each for each in names if name.startswith(".") or not each.startswith(".")]
    same = [each for each in names if each.casefold() == name.casefold()]
    stems = [each for each in names if Path(each).stem == name or each == Path(name).stem]
    near = same or stems or get_close_matches(name, names, n=1)
    return near[0] if near else None
