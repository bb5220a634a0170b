"""Where the bytes of a file are: on the disk, or elsewhere behind a stand-in.

Everything is named by a path on the disk. A file that is elsewhere has a *stand-in* there: its
name, a line of text, and a :class:`Source` that this process knows. What reads files asks here,
so that descriptions are read in ranges, and data in ranges or from the whole file, fetched first.
What would read a stand-in itself finds a line of text, never zeros.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from loratool.errors import unreadable

__all__ = [
    "AT_ONCE",
    "Fetching",
    "Source",
    "Store",
    "check_unchanged",
    "fetch",
    "fetch_unranged",
    "forget",
    "is_stand_in",
    "is_stood_for",
    "listeners",
    "opened",
    "ranged",
    "size_of",
    "source_of",
    "source_of_opened",
    "stand_in",
    "tag_of",
    "tell",
    "unfetched",
    "whole",
]

AT_ONCE: Final = 8
"""How many requests are made at a time."""
MARK: Final = "a stand-in of loratool: the file itself is elsewhere, and was not read\n"


class Store(Protocol):
    """Where several files are that can be fetched together."""

    def lacking(self, sources: Sequence[Source]) -> Sequence[Source]:
        """Return the files that fetching some brings, with what travels along."""
        ...

    def fetch(self, sources: Sequence[Source]) -> None:
        """Bring whole files of this store to the disk.

        Raises:
            LoratoolError: It cannot be done; the message says why.
        """
        ...


class Source(Protocol):
    """The bytes of one file that is elsewhere; they never change."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def store(self) -> Store:
        """Where it is."""
        ...

    @property
    def local(self) -> Path | None:
        """The whole file on the disk, once it is there."""
        ...

    @property
    def is_ranged(self) -> bool:
        """Whether data are read in ranges; of others the whole file is fetched first."""
        ...

    @property
    def mark(self) -> int:
        """A number that is another for a file with other bytes; zero where nothing tells."""
        ...

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on; what is near each other takes few requests.

        Raises:
            LoratoolError: It cannot be read, or has not as many bytes.
        """
        ...

    def get(self, start: int, stop: int) -> bytes | memoryview:
        """Return the bytes from ``start`` to ``stop``, in one request.

        Raises:
            LoratoolError: They cannot be read, or there are not as many.
        """
        ...

    def check_unchanged(self) -> None:
        """Make sure that it is still there as it was.

        Raises:
            LoratoolError: It is not.
        """
        ...


@dataclass(frozen=True, slots=True)
class Fetching:
    """What is about to be fetched.

    Attributes:
        name: Of what.
        files: How many files.
        size: How many bytes.
        folder: Where they go.
    """

    name: str
    files: int
    size: int
    folder: Path


listeners: list[Callable[[Fetching], None]] = []
"""Who is told before files are fetched."""


def tell(fetching: Fetching) -> None:
    """Tell everybody who wants to know that files are about to be fetched."""
    for listener in listeners:
        listener(fetching)


_sources: dict[Path, Source] = {}
"""By the path of the stand-in; empty in a run whose files are all on the disk."""


def stand_in(path: Path, source: Source) -> None:
    """Let a path on the disk, where nothing is yet, stand for a file that is elsewhere."""
    path.write_text(MARK)
    _sources[path] = source


def forget(paths: Iterable[Path]) -> None:
    """Let paths stand for nothing any more."""
    for path in paths:
        _sources.pop(path, None)


def is_stood_for(path: Path, source: Source) -> bool:
    """Whether a path stands for a file already that has the bytes of another one, or none tell."""
    known = _sources.get(path)
    return known is not None and (known.mark, known.size) == (source.mark, source.size)


def is_stand_in(path: Path) -> bool:
    """Whether a path stands for a file that is elsewhere, fetched or not."""
    return path in _sources


def source_of(path: Path) -> Source | None:
    """Return where the bytes of a file are that is not on the disk, or not yet.

    Returns:
        ``None`` for what lies on the disk, stand-ins of what was fetched among them.
    """
    source = _sources.get(path) if _sources else None
    return source if source is not None and source.local is None else None


def tag_of(path: Path) -> str | None:
    """Return what names the content of a file that is elsewhere, where its store says so."""
    source = _sources.get(path) if _sources else None
    return getattr(source, "tag", None)


def whole(path: Path) -> Path:
    """Return the path at which all bytes of a file can be read, fetched first if need be.

    Raises:
        LoratoolError: It cannot be fetched.
    """
    source = _sources.get(path) if _sources else None
    if source is None:
        return path
    if source.local is None:
        fetch([path])
    assert source.local is not None, path
    return source.local


def fetch(paths: Iterable[Path]) -> None:
    """Bring the files behind stand-ins to the disk, those of one store together.

    Raises:
        LoratoolError: One cannot be fetched.
    """
    for store, sources in _by_store(paths):
        store.fetch(sources)


def ranged(path: Path) -> Source | None:
    """Return where the data of a file are read in ranges; ``None`` where they are not."""
    source = source_of(path)
    return source if source is not None and source.is_ranged else None


def fetch_unranged(paths: Iterable[Path]) -> None:
    """Bring those of some files to the disk whose data are not read in ranges.

    Raises:
        LoratoolError: One cannot be fetched.
    """
    fetch(path for path in paths if ranged(path) is None)


def check_unchanged(paths: Iterable[Path]) -> None:
    """Make sure that files whose data are read in ranges are still what they were.

    Raises:
        LoratoolError: One is not.
    """
    sources = [each for each in map(ranged, paths) if each is not None]
    if sources:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda each: each.check_unchanged(), sources))


def unfetched(paths: Iterable[Path]) -> list[Source]:
    """Return the files that would be fetched, were these fetched."""
    return [each for store, sources in _by_store(paths) for each in store.lacking(sources)]


def _by_store(paths: Iterable[Path]) -> Collection[tuple[Store, list[Source]]]:
    """Return the files of which not all bytes are on the disk, those of one store together."""
    stores: dict[int, tuple[Store, list[Source]]] = {}
    for path in dict.fromkeys(paths) if _sources else ():
        source = source_of(path)
        if source is not None:
            stores.setdefault(id(source.store), (source.store, []))[1].append(source)
    return stores.values()


def source_of_opened(file: BinaryIO) -> Source | None:
    """Return where a file is that is open and elsewhere; ``None`` for one of the disk."""
    raw = getattr(file, "raw", None)
    return raw.source if isinstance(raw, _Reader) else None


def size_of(path: Path) -> int:
    """Return the size of a file in bytes, wherever it is.

    Raises:
        FileFormatError: There is none.
    """
    source = _sources.get(path) if _sources else None
    if source is not None:
        return source.size
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None


def opened(path: Path) -> BinaryIO:
    """Open a file to read some of it, which of one that is elsewhere is all that is fetched.

    Raises:
        OSError: It cannot be opened.
    """
    source = _sources.get(path) if _sources else None
    if source is None:
        return path.open("rb")
    if source.local is not None:
        return source.local.open("rb")
    return io.BufferedReader(_Reader(source))


class _Reader(io.RawIOBase):
    """A file that is elsewhere, as one that is open for reading."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.source.size}[whence]
        if start + offset < 0:
            raise ValueError("a place before the file")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # as RawIOBase calls it
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self.source.size - self._at))]
        if len(view):
            self.source.read_into(view, self._at)
        self._at += len(view)
        return len(view)
