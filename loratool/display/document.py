"""What people see of a report, as plain data: facts, tables, remarks and sentences.

All of it is text as it was found; whoever shows it escapes it for a terminal or a page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = [
    "Block",
    "Cell",
    "Column",
    "Document",
    "Facts",
    "Group",
    "Lines",
    "Remark",
    "Remarks",
    "Row",
    "Table",
]

Cell = str | int | tuple[str, ...]
"""What is in one place of a table; a tuple is one line for each of its items."""
Row = tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and what is said under each.

    Attributes:
        pairs: Name and value.
        title: What they are about; empty where that is clear.
    """

    pairs: tuple[tuple[str, str], ...]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    Attributes:
        title: What is above it.
        folds: Whether its cells may take several lines: paths, file names and sentences.
        is_kept: Whether it stays a column where all rows say the same in it.
    """

    title: str
    folds: bool = False
    is_kept: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of a table that belong together, under a name."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under named columns.

    Attributes:
        title: What it is about; empty where that is clear.
        columns: Its columns.
        groups: Its rows; one group without a name where they are not grouped.
    """

    title: str
    columns: tuple[Column, ...]
    groups: tuple[Group, ...]

    @staticmethod
    def of(title: str, columns: Sequence[Column | str], rows: Iterable[Row]) -> Table:
        """Return a table of ungrouped rows; of a column its title may do."""
        return Table(title, _columns(columns), (Group("", tuple(rows)),))

    @staticmethod
    def grouped(title: str, columns: Sequence[Column | str], groups: Iterable[Group]) -> Table:
        """Return a table of rows in groups; of a column its title may do."""
        return Table(title, _columns(columns), tuple(groups))

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all groups."""
        return tuple(row for group in self.groups for row in group.rows)

    @property
    def common(self) -> tuple[tuple[str, str], ...]:
        """The columns in which all rows say the same, by their titles, and what they say.

        Those that say nothing in any row are not among them.
        """
        rows = self.rows
        return tuple(
            (self.columns[index].title, words)
            for index in self._common(rows)
            if (words := _words(rows[0][index]))
        )

    def without_common(self) -> Table:
        """Return the table without the columns in which all rows say the same."""
        common = set(self._common(self.rows))
        if not common:
            return self
        kept = [index for index in range(len(self.columns)) if index not in common]
        groups = (
            Group(group.name, tuple(tuple(row[index] for index in kept) for row in group.rows))
            for group in self.groups
        )
        return Table(self.title, tuple(self.columns[index] for index in kept), tuple(groups))

    def _common(self, rows: Sequence[Row]) -> Iterator[int]:
        for index, column in enumerate(self.columns):
            if rows and not column.is_kept and len({row[index] for row in rows}) == 1:
                yield index


@dataclass(frozen=True, slots=True)
class Remark:
    """One thing that was found.

    Attributes:
        level: ``error``, ``warning`` or ``info``.
        code: What to look up.
        where: File, module or tensor.
        text: What was found.
        hint: The next step; empty where there is none.
    """

    level: str
    code: str
    where: str
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Remarks:
    """Everything that was found, and in one sentence how much that is."""

    items: tuple[Remark, ...]
    summary: str


@dataclass(frozen=True, slots=True)
class Lines:
    """Sentences, one a line."""

    lines: tuple[str, ...]


Block = Facts | Table | Remarks | Lines


@dataclass(frozen=True, slots=True)
class Document:
    """What people see of a report, from top to bottom.

    Attributes:
        blocks: Its parts.
        notes: What a user should know besides, one sentence each.
    """

    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(blocks: Iterable[Block], notes: Iterable[str] = ()) -> Document:
        """Return a document of those blocks that hold anything."""
        return Document(tuple(block for block in blocks if _holds_something(block)), tuple(notes))


def _columns(columns: Sequence[Column | str]) -> tuple[Column, ...]:
    return tuple(Column(item) if isinstance(item, str) else item for item in columns)


def _words(cell: Cell) -> str:
    return ", ".join(cell) if isinstance(cell, tuple) else str(cell)


def _holds_something(block: Block) -> bool:
    if isinstance(block, Facts):
        return bool(block.pairs)
    if isinstance(block, Table):
        return any(group.rows for group in block.groups)
    return isinstance(block, Remarks) or bool(block.lines)
