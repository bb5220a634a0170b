"""What a verb says of many paths, one after another: read as it goes, told as a table or lines."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Generic, Protocol, TypeVar

from loratool.display.document import Column, Document, Table
from loratool.display.shown import Shown
from loratool.errors import LoratoolError, unreadable
from loratool.schemes.folders import Place, places

__all__ = ["Many", "Record", "Unread", "not_read"]


class Told(Protocol):
    """What is said of one path."""

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""


Found = TypeVar("Found", bound=Told)
Progress = Callable[[int, int], None]
Record = Mapping[str, Any]
"""What a row says, by column: numbers, texts and lists of such."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A path that could not be read.

    Attributes:
        place: The path, and what it is called.
        error: Why.
    """

    place: Place
    error: LoratoolError

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        return {"schema": 1, "path": str(self.place.path), "error": self.error.as_json()}


class Many(Shown, Generic[Found]):
    """What a verb says of many paths. It is read anew whenever somebody goes through it.

    Args:
        paths: Files and folders; of a folder of adapters, every one of them.
        recursive: Look into all folders.
    """

    def __init__(self, paths: Sequence[str | PathLike[str]], *, recursive: bool) -> None:
        self.paths = tuple(paths)
        self.recursive = recursive

    columns: tuple[str, ...]
    """What rows say, from ``name`` and ``path`` to ``error``."""
    compares: bool = False
    """Whether rows say how paths are alike, so that all are read before the first is told."""

    @abstractmethod
    def one(self, place: Place) -> Found:
        """Return what is said of one path.

        Raises:
            LoratoolError: It cannot be read.
        """

    @abstractmethod
    def record(self, place: Place, found: Found | Unread) -> Record:
        """Return a row."""

    @abstractmethod
    def page(self, records: Sequence[Record]) -> Document:
        """Return what people see of rows."""

    def compared(
        self, rows: list[dict[str, Any]], progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """Return rows with what only all of them together tell."""
        return rows

    def added(self, row: Record) -> dict[str, Any]:
        """Return what a row adds to the document of its path."""
        return {}

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        return {"schema": 1, "items": [found.as_json() for found in self]}

    def pairs(self, progress: Progress | None = None) -> Iterator[tuple[Place, Found | Unread]]:
        """Yield every place, with what is said of it; it is read when it is asked for.

        Args:
            progress: Called with how many are read, and of how many.
        """
        total = 0
        if progress is not None:
            total = sum(1 for _ in places(self.paths, recursive=self.recursive))
        for number, place in enumerate(self.places(), 1):
            yield place, self._read(place)
            if progress is not None:
                progress(number, total)

    def places(self) -> Iterator[Place]:
        """Yield every place that something is said of."""
        return places(self.paths, recursive=self.recursive)

    def notes(self) -> Sequence[str]:
        """Return what a user should know once all are read, one sentence each."""
        return ()

    def _read(self, place: Place) -> Found | Unread:
        if place.error is not None:
            return Unread(place, place.error)
        try:
            return self.one(place)
        except LoratoolError as error:
            return Unread(place, error)
        except OSError as error:
            return Unread(place, unreadable(place.path, error))

    def __iter__(self) -> Iterator[Found | Unread]:
        """Yield what is said of every path."""
        return (found for _, found in self.pairs())

    def records(self) -> list[dict[str, Any]]:
        """Return the rows as plain dictionaries, for a table of data."""
        return self.compared([dict(self.record(place, found)) for place, found in self.pairs()])

    def document(self) -> Document:
        """Return what people see of all of them."""
        return self.page(self.records())


def not_read(records: Iterable[Record]) -> Table:
    """Return the rows of what could not be read, with the reason and the next step."""
    rows = [(str(each["name"]), each["error"]) for each in records if each["error"]]
    return Table.of(
        "not read",
        (
            Column("name", folds=True, is_kept=True),
            Column("code", is_kept=True),
            Column("why", folds=True, is_kept=True),
        ),
        [
            (name, str(error["code"]), tuple(filter(None, (error["message"], error["hint"]))))
            for name, error in rows
        ],
    )
