"""What people and scripts see: JSON, tables, notes, progress. Names are shown, never obeyed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from loratool.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from loratool.adapter.findings import Finding

__all__ = [
    "collected",
    "console",
    "human_bytes",
    "human_count",
    "print_json",
    "print_notes",
    "print_table",
    "progress_bar",
    "report_findings",
]

READABLE: Final = 1 << 20
"""Characters up to which a JSON document is indented."""
WIDTH_WITHOUT_TERMINAL: Final = 160
STYLES: Final = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def console() -> Console:
    """Return the console of standard output: no markup, no guessing at colours for numbers."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL
    return Console(markup=False, highlight=False, emoji=False, width=width, soft_wrap=False)


_collecting: list[list[Any]] = []


@contextmanager
def collected(documents: list[Any]) -> Iterator[None]:
    """Have documents appended to ``documents`` instead of printed."""
    _collecting.append(documents)
    try:
        yield
    finally:
        _collecting.pop()


def print_json(value: Any) -> None:
    """Print one JSON document, indented unless it is so large that nobody reads it."""
    if _collecting:
        _collecting[-1].append(value)
        return
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    if len(text) < READABLE:  # indenting takes ten times as long
        text = json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False)
    click.echo(text)


def print_notes(notes: Iterable[str]) -> None:
    """Print notes to standard error, one line each."""
    for note in notes:
        click.echo(f"note: {printable(note)}", err=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; numbers go to the right, names are shown as they are.

    A cell that is a tuple is shown as one line for each of its items.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    filled = [[_lines(cell) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        is_number = bool(filled) and all(_is_number(row[index]) for row in filled)
        table.add_column(
            column, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number
        )
    for row in filled:
        table.add_row(*(Text("\n".join(printable(line) for line in cell)) for cell in row))
    console().print(table)


def _lines(cell: object) -> tuple[str, ...]:
    return tuple(str(item) for item in cell) if isinstance(cell, tuple) else (str(cell),)


def _is_number(cell: tuple[str, ...]) -> bool:
    return len(cell) == 1 and re.fullmatch(r"-?[\d.,]+", cell[0]) is not None


def report_findings(findings: Sequence[Finding], *, as_json: bool, clean: str) -> int:
    """Print findings, for a script or for a person, and return the exit status they mean."""
    ok = not any(finding.is_error for finding in findings)
    if as_json:
        print_json({"schema": 1, "ok": ok, "findings": [item.as_json() for item in findings]})
    else:
        _print_findings(findings, clean)
    return 0 if ok else 1


def _print_findings(findings: Sequence[Finding], clean: str) -> None:
    from rich.text import Text

    out = console()
    for item in findings:
        line = Text()
        line.append(f"{item.severity:<8}", style=STYLES[item.severity])
        line.append(f"{item.code}  ", style="dim")
        line.append(printable(item.where), style="bold")
        line.append(f"  {printable(item.message)}")
        out.print(line, soft_wrap=True)
        if item.hint:
            out.print(Text(f"{'':<15}hint: {printable(item.hint)}", style="dim"), soft_wrap=True)
    counts = {name: sum(f.severity == name for f in findings) for name in STYLES}
    words = [f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items() if count]
    out.print(Text(", ".join(words).replace("infos", "info") if words else clean))


def human_bytes(count: int) -> str:
    """Return a size in decimal units, as file managers show it."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def human_count(count: int) -> str:
    """Return a number with thousands apart."""
    return f"{count:,}"


@contextmanager
def progress_bar(words: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Give a function that shows progress on standard error, where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(words), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(words, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
