"""A document as HTML: every text is escaped, and nothing is loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from typing import Final

from loratool.display.document import (
    Block,
    Cell,
    Document,
    Facts,
    Lines,
    Remarks,
    Table,
)
from loratool.display.layout import is_number
from loratool.display.wrapping import pieces
from loratool.errors import printable

__all__ = ["fragment", "hypertext"]

RIGHT: Final = ' style="text-align:right"'
LEFT: Final = ' style="text-align:left"'


def fragment(document: Document) -> str:
    """Return a document as one ``div``, with its notes at the end."""
    parts = [part for block in document.blocks for part in _block(block)]
    if document.notes:
        items = "".join(f"<li>{hypertext(note)}</li>" for note in document.notes)
        parts.append(f'<ul class="notes">{items}</ul>')
    return '<div class="loratool">\n' + "\n".join(parts) + "\n</div>"


def hypertext(text: object) -> str:
    """Return ``text`` escaped, with places where a browser may fold it."""
    return "<wbr>".join(map(escape, pieces(printable(text)))).replace(" <wbr>", " ")


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Facts):
        yield _facts(block.pairs, block.title)
    elif isinstance(block, Table):
        yield from _table(block)
    elif isinstance(block, Remarks):
        yield from _remarks(block)
    else:
        yield from _lines(block)


def _lines(block: Lines) -> Iterator[str]:
    for line in block.lines:
        yield f"<p>{hypertext(line)}</p>"


def _facts(pairs: Iterable[tuple[str, str]], title: str) -> str:
    rows = (
        f"<tr><th{LEFT}>{hypertext(name)}</th><td{LEFT}>{hypertext(value)}</td></tr>"
        for name, value in pairs
    )
    return f'<table class="facts">{_caption(title)}<tbody>{"".join(rows)}</tbody></table>'


def _table(table: Table) -> Iterator[str]:
    common, kept = table.common, table.without_common()
    title = table.title
    if common:
        yield _facts(common, title)
        title = ""
    if not kept.columns:
        return
    rows = kept.rows
    sides = [
        RIGHT if all(is_number(row[index]) for row in rows) else LEFT
        for index in range(len(kept.columns))
    ]
    heads = "".join(
        f"<th{side}>{hypertext(column.title)}</th>"
        for column, side in zip(kept.columns, sides, strict=True)
    )
    bodies = []
    for group in kept.groups:
        head = f'<tr><th colspan="{len(sides)}"{LEFT}>{hypertext(group.name)}</th></tr>'
        lines = (
            "".join(f"<td{side}>{_cell(cell)}</td>" for cell, side in zip(row, sides, strict=True))
            for row in group.rows
        )
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        bodies.append(f"<tbody>{head if group.name else ''}{body}</tbody>")
    yield (
        f'<table class="rows">{_caption(title)}<thead><tr>{heads}</tr></thead>'
        f"{''.join(bodies)}</table>"
    )


def _remarks(block: Remarks) -> Iterator[str]:
    for item in block.items:
        hint = f"<br><small>hint: {hypertext(item.hint)}</small>" if item.hint else ""
        level = hypertext(item.level)
        yield (
            f'<p class="{level}"><b>{level}</b> {hypertext(item.code)} '
            f"<b>{hypertext(item.where)}</b> {hypertext(item.text)}{hint}</p>"
        )
    yield f"<p>{hypertext(block.summary)}</p>"


def _caption(title: str) -> str:
    return f"<caption{LEFT}>{hypertext(title)}</caption>" if title else ""


def _cell(cell: Cell) -> str:
    items = cell if isinstance(cell, tuple) else (cell,)
    return "<br>".join(hypertext(item) for item in items)
