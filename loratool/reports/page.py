"""One page about a report: everything is in it, nothing is loaded, nothing in it can run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any, Final

import loratool
from loratool.display.document import Block, Cell, Document, Facts, Lines, Remarks, Table
from loratool.display.html import fragment, hypertext
from loratool.display.shown import Shown
from loratool.errors import LoratoolError, OptionError, OutputError, printable
from loratool.files.atomic import check_output, staged
from loratool.reports.charts import Chart, Heat, charts_of, charts_of_many, is_drawn, title_of
from loratool.reports.svg import drawing
from loratool.verbs.inspect import AdapterInfo
from loratool.verbs.inspection.many import Inspections
from loratool.verbs.validate import validate, validate_many

__all__ = ["check_page", "page", "write_page"]

FORMATS: Final = (".html", ".htm")
LONGEST: Final = 240
"""Characters of one text; names in files can be megabytes."""
MOST_TOLD: Final = 8000
"""Cells of all heat maps up to which each tells a pointer its number."""
MOST_ROWS: Final = 400
"""Rows of one table; what is more is said to be there."""


def check_page(path: Path, *, force: bool, inputs: Sequence[Path]) -> None:
    """Make sure that a page can be written to ``path``, before any work is done.

    Raises:
        OptionError: Its ending is none of a page.
        OutputError: It exists, or cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError("--report", f"{path.name!r} does not end in .html")
    if path.is_dir():
        raise OutputError(path, "is a folder; a page is a file", hint="choose another name")
    check_output(path, force=force, inputs=inputs, kinds=FORMATS)


def write_page(report: Shown, path: str | PathLike[str], *, force: bool = False) -> None:
    """Write a page about a report: what it says, pictures, findings and metadata.

    Args:
        report: What a function returned; charts are drawn of those that :func:`plot` draws.
        path: An ``.html`` file.
        force: Replace an existing one.

    Raises:
        OptionError: Its ending is another.
        OutputError: It exists, or cannot be written.
    """
    place = Path(path)
    check_page(place, force=force, inputs=())
    content = page(report).encode()
    with staged(place, folder=False, force=force, sync=False) as partial:
        partial.write_bytes(content)


def page(report: Shown) -> str:
    """Return a page about a report as text."""
    title = title_of(report)
    script = _resource("page.js")
    style = _resource("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    body = "\n".join(
        f"<section><h2>{escape(head)}</h2>\n{content}\n</section>"
        for head, content in _sections(report)
    )
    shown = hypertext(_cut(title))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(_cut(printable(title)))}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{shown}</h1><p>by loratool {escape(loratool.__version__)}</p></header>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def _sections(report: Shown) -> Iterator[tuple[str, str]]:
    """Yield what is on the page: a heading and what is under it, which is escaped."""
    charts: tuple[Chart, ...] = ()
    if isinstance(report, Inspections):
        read = list(report.pairs())  # once: their spectra may be among it
        rows = report.compared([dict(report.record(place, one)) for place, one in read])
        whole = report.page(rows)
        charts = charts_of_many({p.name: o for p, o in read if isinstance(o, AdapterInfo)})
    elif isinstance(report, AdapterInfo):
        whole = report.document(names_all=True)
    else:
        whole = report.document()
    document = _shortened(whole)
    has_facts = any(isinstance(block, Facts) for block in document.blocks)
    detailed = (Table, Lines) if has_facts else (Table,)  # sentences are about tables, or all
    tables = tuple(block for block in document.blocks if isinstance(block, detailed))
    others = tuple(block for block in document.blocks if not isinstance(block, detailed))
    if others or document.notes:
        yield "Summary", fragment(Document(others, document.notes))
    if is_drawn(report):
        charts = charts_of(report)
    if charts:
        cells = sum(len(c.rows) * len(c.columns) for c in charts if isinstance(c, Heat))
        figures = (
            f"<figure><figcaption>{hypertext(_cut(chart.title))}</figcaption>"
            f'<div class="chart">{drawing(chart, is_told=cells <= MOST_TOLD)}</div></figure>'
            for chart in charts
        )
        yield "Pictures", f'<div class="charts">{"".join(figures)}</div>'
    if tables:
        yield "Details", fragment(Document(tables))
    if isinstance(report, Inspections):
        found = validate_many(report.paths, recursive=report.recursive)
        yield "Findings", fragment(_shortened(found.document()))
    if not isinstance(report, AdapterInfo):
        return
    yield "Findings", _findings(report)
    adapter = report.adapter
    if adapter.config is not None:
        yield "Configuration", _facts(adapter.config.raw)
    if adapter.metadata:
        yield "Metadata", _facts(adapter.metadata)


def _findings(info: AdapterInfo) -> str:
    """Return what ``validate`` says of the adapter."""
    try:
        found = validate(info.adapter.path, adapter_name=info.adapter.name or None)
    except LoratoolError as error:
        return f"<p>{hypertext(_cut(str(error)))}</p>"
    return fragment(_shortened(found.document()))


def _facts(values: Mapping[str, Any]) -> str:
    pairs = tuple((_cut(name), _told(value)) for name, value in values.items())
    return fragment(Document((Facts(pairs),)))


def _told(value: Any) -> str:
    """Return a value of metadata; pictures in it are not shown."""
    text = value if isinstance(value, str) else repr(value)
    if text.startswith("data:"):
        return f"{text[:40].partition(';')[0]}, {len(text):,} characters"
    return _cut(text)


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]} … {text[-LONGEST // 3 :]} ({len(text):,} characters)"


def _shortened(document: Document) -> Document:
    """Return a document whose texts and tables have a length that a page has room for."""
    blocks = (_shortened_block(block) for block in document.blocks)
    return Document(tuple(blocks), tuple(map(_cut, document.notes)))


def _shortened_block(block: Block) -> Block:
    if isinstance(block, Facts):
        pairs = tuple((_cut(name), _cut(value)) for name, value in block.pairs)
        return replace(block, pairs=pairs)
    if isinstance(block, Lines):
        return Lines(tuple(map(_cut, block.lines)))
    if isinstance(block, Remarks):
        items = tuple(
            replace(item, where=_cut(item.where), text=_cut(item.text), hint=_cut(item.hint))
            for item in block.items[:MOST_ROWS]
        )
        return replace(block, items=items)
    return _shortened_table(block)


def _shortened_table(table: Table) -> Table:
    groups, room = [], MOST_ROWS
    for group in table.groups:
        rows = tuple(tuple(map(_shortened_cell, row)) for row in group.rows[:room])
        room -= len(rows)
        if rows:
            groups.append(replace(group, name=_cut(group.name), rows=rows))
    left = len(table.rows) - MOST_ROWS
    title = f"{table.title} (and {left:,} rows more)".strip() if left > 0 else table.title
    return replace(table, title=title, groups=tuple(groups))


def _shortened_cell(cell: Cell) -> Cell:
    if isinstance(cell, tuple):
        return tuple(map(_cut, cell[:MOST_ROWS]))
    return _cut(cell) if isinstance(cell, str) else cell


def _resource(name: str) -> str:
    """Return what lies beside this module, in a folder or in an archive."""
    return files("loratool.reports").joinpath(name).read_text("utf-8")
