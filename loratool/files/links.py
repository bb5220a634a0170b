"""Links in a model's folder: followed only to where its weights are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

__all__ = ["DANGLING_LINK", "NOT_FILES", "NO_FILE", "STRAY_LINK", "link_roots", "stays_inside"]

STRAY_LINK: Final = "a link that leaves the folder"
DANGLING_LINK: Final = "a link to nothing"
NO_FILE: Final = "no regular file"
NOT_FILES: Final = (STRAY_LINK, DANGLING_LINK, NO_FILE)


def stays_inside(path: Path, roots: Sequence[Path]) -> bool:
    """Whether a file, links followed, lies below one of ``roots``."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return False
    return any(target.is_relative_to(root) for root in roots)


def link_roots(folder: Path, weights: Iterable[Path]) -> list[Path]:
    """Return where links may lead: the folder, and wherever its weights really are.

    That covers the blobs of a hub cache and folders made of links to another model; a stray
    link to anything else is not followed.
    """
    return [folder.resolve(), *{path.resolve().parent for path in weights}]
