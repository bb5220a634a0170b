"""A document as lines of text: the one way in which it is set, on terminals and in pipes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from loratool.display.document import (
    Block,
    Cell,
    Column,
    Document,
    Facts,
    Group,
    Lines,
    Remark,
    Remarks,
    Table,
)
from loratool.display.wrapping import INDENT, longest_piece, width_of, wrapped
from loratool.errors import printable

__all__ = ["Line", "Span", "is_number", "lines_of"]

GAP: Final = "  "
"""What stands between columns."""
NARROWEST: Final = 16
"""A column of folded names is not made narrower than this, or than its longest piece."""
UNITS: Final = (" %", "%", " kB", " MB", " GB", " TB", " B")

Clean = Callable[[object], str]


@dataclass(frozen=True, slots=True)
class Span:
    """Text in one style: a word that ``rich`` knows, such as ``bold``; empty for plain text."""

    text: str
    style: str = ""


Line = tuple[Span, ...]


def lines_of(document: Document, width: int | None, clean: Clean = printable) -> Iterator[Line]:
    """Yield the lines of a document; blocks have one empty line between them.

    Args:
        document: What to set.
        width: Columns that there are; ``None`` where lines may be as long as they are.
        clean: What makes text safe to show, character for character.
    """
    setter = _Setter(width, clean)
    for index, block in enumerate(document.blocks):
        if index:
            yield ()
        yield from setter.lines(block)


def is_number(cell: Cell) -> bool:
    """Whether a cell is a number, a size or a range of numbers, or a dash in place of one."""
    if not isinstance(cell, str):
        return isinstance(cell, int)
    text = cell.removeprefix("× ")
    unit = next((unit for unit in UNITS if text.endswith(unit)), "")
    return cell == "-" or all(map(_is_figure, text.removesuffix(unit).split(" to ")))


def _is_figure(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return text[-1].isdigit()  # and no word for what is none


@dataclass(frozen=True, slots=True)
class _Setter:
    width: int | None
    clean: Clean

    def lines(self, block: Block) -> Iterator[Line]:
        if isinstance(block, Facts):
            yield from self._facts(block)
        elif isinstance(block, Table):
            yield from self._table(block)
        elif isinstance(block, Remarks):
            yield from self._remarks(block)
        else:
            yield from self._sentences(block)

    def _sentences(self, block: Lines) -> Iterator[Line]:
        for line in block.lines:
            yield from ((Span(part),) for part in wrapped(self.clean(line), self.width))

    def _facts(self, block: Facts) -> Iterator[Line]:
        if block.title:
            yield (Span(self.clean(block.title), "bold"),)
        names = [self.clean(name) for name, _ in block.pairs]
        margin = max(map(width_of, names)) + len(GAP)
        room = None if self.width is None else max(NARROWEST, self.width - margin)
        for name, (_, value) in zip(names, block.pairs, strict=True):
            first, *others = wrapped(self.clean(value), room)
            yield (Span(_padded(name, margin), "dim"), Span(first))
            yield from ((Span(" " * margin), Span(line)) for line in others)

    def _remarks(self, block: Remarks) -> Iterator[Line]:
        for item in block.items:
            yield from self._remark(item)
        yield (Span(self.clean(block.summary)),)

    def _remark(self, item: Remark) -> Iterator[Line]:
        where = self.clean(item.where)
        text, hint = f"{where}  {self.clean(item.text)}", f"hint: {self.clean(item.hint)}"
        margin = 8 + len(item.code) + len(GAP)
        room = None if self.width is None else max(NARROWEST, self.width - margin)
        first, *others = wrapped(text, room)
        yield (
            Span(f"{item.level:<8}", LEVELS.get(item.level, "")),
            Span(f"{item.code}{GAP}", "dim"),
            Span(first[: len(where)], "bold"),
            Span(first[len(where) :]),
        )
        yield from ((Span(" " * margin), Span(line)) for line in others)
        if item.hint:
            yield from ((Span(" " * margin), Span(line, "dim")) for line in wrapped(hint, room))

    def _table(self, table: Table) -> Iterator[Line]:
        if table.title:
            yield (Span(self.clean(table.title), "bold"),)
        common, kept = table.common, table.without_common()
        if common:
            words = "in all: " + "; ".join(f"{name} {value}" for name, value in common)
            yield from ((Span(line),) for line in wrapped(self.clean(words), self.width))
        if kept.columns:
            yield from self._rows(kept)

    def _rows(self, table: Table) -> Iterator[Line]:
        cells = [
            [[self._cell(cell) for cell in row] for row in group.rows] for group in table.groups
        ]
        rows = [row for group in cells for row in group]
        columns = [replace(column, title=self.clean(column.title)) for column in table.columns]
        widths = self._widths(columns, rows)
        if widths is None or all(group.name and len(group.rows) == 1 for group in table.groups):
            yield from self._stacked(columns, table.groups, cells)
            return
        places = range(len(widths))
        to_right = [all(is_number(row[index]) for row in table.rows) for index in places]
        heads = [wrapped(column.title, widths[i], "") for i, column in enumerate(columns)]
        yield from _set(heads, widths, to_right, "bold", to_bottom=True)
        for group, members in zip(table.groups, cells, strict=True):
            if group.name:
                yield (Span(self.clean(group.name), "bold"),)
            for row in members:
                folded = [
                    [line for text in cell for line in wrapped(text, width)]
                    for cell, width in zip(row, widths, strict=True)
                ]
                yield from _set(folded, widths, to_right)

    def _cell(self, cell: Cell) -> list[str]:
        items = cell if isinstance(cell, tuple) else (cell,)
        return [self.clean(item) for item in items] or [""]

    def _widths(
        self, columns: Sequence[Column], rows: Sequence[Sequence[Sequence[str]]]
    ) -> list[int] | None:
        """Return how wide columns are; ``None`` where there is no room for them beside another."""
        longest = [max(width_of(t) for row in rows for t in row[i]) for i in range(len(columns))]
        widths = [max(width_of(c.title), longest[i]) for i, c in enumerate(columns)]
        if self.width is None or _total(widths) <= self.width:
            return widths
        widths = [max(longest_piece(c.title), longest[i]) for i, c in enumerate(columns)]
        least = [
            min(widths[i], max(NARROWEST, *(longest_piece(t) for row in rows for t in row[i])))
            if column.folds
            else widths[i]
            for i, column in enumerate(columns)
        ]
        if _total(least) > self.width:
            least = [
                min(widths[i], NARROWEST) if column.folds else widths[i]
                for i, column in enumerate(columns)
            ]
        room = self.width - _total(least)
        if room < 0:
            return None
        for index in sorted(range(len(columns)), key=lambda i: widths[i] - least[i]):
            wanting = sum(widths[i] > least[i] for i in range(len(columns)))
            if widths[index] > least[index]:
                more = min(widths[index] - least[index], room // wanting)
                least[index] += more
                room -= more
                widths[index] = least[index]
        return least

    def _stacked(
        self,
        columns: Sequence[Column],
        groups: Sequence[Group],
        cells: Sequence[Sequence[Sequence[Sequence[str]]]],
    ) -> Iterator[Line]:
        """Yield rows below each other: names on lines of their own, the rest in a sentence.

        The only row of a group has that sentence behind the group's name.
        """
        for group, members in zip(groups, cells, strict=True):
            for number, row in enumerate(members):
                names, others = (row[0], row[1:]) if columns[0].folds else ([], row)
                said = zip(columns[len(row) - len(others) :], others, strict=True)
                rest = "; ".join(f"{c.title} {', '.join(t)}" for c, t in said if any(t))
                heading = self.clean(group.name) if number == 0 else ""
                if heading and len(members) == 1:
                    first, *others = wrapped(f"{heading}: {rest}", self.width)
                    yield (Span(first[: len(heading)], "bold"), Span(first[len(heading) :]))
                    yield from ((Span(line),) for line in others)
                    yield from self._lines(names, INDENT)
                    continue
                if heading:
                    yield (Span(heading, "bold"),)
                yield from self._lines(names, "")
                yield from self._lines([rest] if rest else [], INDENT)

    def _lines(self, texts: Iterable[str], indent: str) -> Iterator[Line]:
        room = None if self.width is None else max(1, self.width - len(indent))
        for text in texts:
            yield from ((Span(indent + line),) for line in wrapped(text, room))


LEVELS: Final = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _padded(text: str, width: int, *, to_right: bool = False) -> str:
    padding = " " * max(0, width - width_of(text))
    return padding + text if to_right else text + padding


def _set(
    cells: Sequence[Sequence[str]],
    widths: Sequence[int],
    to_right: Sequence[bool],
    style: str = "",
    *,
    to_bottom: bool = False,
) -> Iterator[Line]:
    """Yield the lines of one row."""
    height = max(map(len, cells))
    for number in range(height):
        texts = []
        for cell, width, is_right in zip(cells, widths, to_right, strict=True):
            index = number - (height - len(cell)) if to_bottom else number
            text = cell[index] if 0 <= index < len(cell) else ""
            texts.append(_padded(text, width, to_right=is_right))
        yield (Span(GAP.join(texts).rstrip(), style),)
