"""Where inputs lie on one machine, and what tells on any other that they are the same.

A plan names files by a *root* (``base``, ``adapter 0``) and what lies below it; each process knows
where its roots are. A file is the same where its size, its time, and its first and last bytes are:
that holds on every machine that mounts a file system, and for copies that keep the time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from loratool.errors import FileFormatError, unreadable
from loratool.files.inputs import Stamp, stamp_of
from loratool.files.places import located, origin_of
from loratool.files.sources import is_stand_in, opened, size_of, tag_of
from loratool.shards.folder import is_inside

__all__ = ["Mark", "Roots", "check_marks", "mark_of"]

PROBED: Final = 64 << 10
"""Bytes of both ends of a file that are compared: headers are at one of them."""
SECOND: Final = 10**9
HINT: Final = "give all workers the same files; copies keep their time with cp -p or rsync -t"


@dataclass
class Roots:
    """Folders that files lie below.

    Attributes:
        named: What each is called here: a path, or an address that :func:`located` knows.
    """

    named: dict[str, str] = field(default_factory=dict)
    _places: dict[str, Path] = field(default_factory=dict)
    _known: dict[Path, tuple[str, str]] = field(default_factory=dict)

    @staticmethod
    def of(paths: Mapping[str, str | os.PathLike[str]]) -> Roots:
        """Return the roots of what a command was given: folders, or files, which lie in theirs."""
        roots = Roots()
        for name, path in paths.items():
            place = located(path)
            text = os.fspath(path)
            if place == Path(text):
                folder = place if place.is_dir() else place.parent
                text = os.path.abspath(folder)  # noqa: PTH100 - links stay
            roots.named[name] = text
        return roots

    def _place(self, root: str) -> Path:
        """Return the folder of a root."""
        if root not in self._places:
            place = located(self.named[root])
            self._places[root] = place if place.is_dir() else place.parent
        return self._places[root]

    def below(self, path: Path) -> tuple[str, str]:
        """Return the root that a path lies below, and where; a new one where there is none."""
        if path not in self._known:
            self._known[path] = self._found_below(path)
        return self._known[path]

    def _found_below(self, path: Path) -> tuple[str, str]:
        absolute = Path(os.path.abspath(path))  # noqa: PTH100
        for name in self.named:
            if absolute.is_relative_to(self._place(name)):
                return name, absolute.relative_to(self._place(name)).as_posix()
        name = f"other {len(self.named)}"
        self.named[name] = str(absolute.parent)
        return name, absolute.name

    def placed(self, root: str, below: str) -> Path:
        """Return the path that lies below a root.

        Raises:
            FileFormatError: There is no such root, or the path leads out of it.
        """
        if root not in self.named or not (below == "." or is_inside(below)):
            raise FileFormatError(f"{root}: {below}", "is no path of this plan")
        return self._place(root) / below


@dataclass(frozen=True, slots=True)
class Mark:
    """What tells on any machine whether a file is the one that was planned with.

    Attributes:
        size: Its size in bytes.
        modified: When it was written to, in nanoseconds; ``None`` of what is named by a tag.
        tag: The commit or the entity tag that names its content, of what is not on a disk.
        ends: SHA-256 of its first and last bytes.
    """

    size: int
    modified: int | None
    tag: str | None
    ends: str

    def fits(self, other: Mark) -> bool:
        """Whether both are of one content; some file systems keep whole seconds only."""
        if (self.size, self.tag, self.ends) != (other.size, other.tag, other.ends):
            return False
        times = (self.modified, other.modified)
        if None in times or times[0] == times[1]:
            return times[0] == times[1]
        seconds = [divmod(time or 0, SECOND) for time in times]
        return seconds[0][0] == seconds[1][0] and 0 in (seconds[0][1], seconds[1][1])


def mark_of(path: Path) -> Mark:
    """Return the mark of a file.

    Raises:
        FileFormatError: It cannot be read.
    """
    try:
        size = size_of(path)
        origin, tag = origin_of(path), tag_of(path)
        if origin is not None:
            tag = f"{origin.repo}@{origin.commit}/{origin.inside}"
        is_far = is_stand_in(path)  # there the tag says all of it; nothing is fetched for a mark
        modified = None if tag is not None or is_far else stamp_of(path).modified
        digest = hashlib.sha256()
        if not is_far:
            with opened(path) as file:
                digest.update(file.read(PROBED))
                file.seek(max(0, size - PROBED))
                digest.update(file.read(PROBED))
    except OSError as error:
        raise unreadable(path, error) from None
    return Mark(size, modified, tag, digest.hexdigest())


def check_marks(marks: Mapping[Path, Mark]) -> dict[Path, Stamp]:
    """Make sure that files are those that were planned with, and return what they are here.

    Raises:
        FileFormatError: One is another.
    """
    stamps: dict[Path, Stamp] = {}
    for path, mark in marks.items():
        is_same = mark_of(path).fits(mark)
        with opened(path) as file:
            stamps[path] = stamp_of(file)
        if not is_same:
            raise FileFormatError(
                path, "is not the file that the plan was made with, or has changed", hint=HINT
            )
    return stamps
