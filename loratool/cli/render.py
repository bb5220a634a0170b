"""What people and scripts see: JSON, documents, notes, progress. Names are shown, never obeyed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import click

from loratool.display.characters import writable
from loratool.errors import spoken

if TYPE_CHECKING:
    from rich.progress import Progress

    from loratool.display.document import Document

__all__ = [
    "collected",
    "print_csv",
    "print_json",
    "print_lines",
    "print_notes",
    "progress_bar",
    "show",
]

MOMENT: Final = 0.5
"""Seconds before which no progress of many small things is shown."""
READABLE: Final = 1 << 20
"""Characters up to which a JSON document is indented."""

_collecting: ContextVar[list[Any] | None] = ContextVar("_collecting", default=None)


@contextmanager
def collected(documents: list[Any]) -> Iterator[None]:
    """Have the documents of this thread appended to ``documents`` instead of printed."""
    token = _collecting.set(documents)
    try:
        yield
    finally:
        _collecting.reset(token)


def print_json(value: Any) -> None:
    """Print one JSON document, indented unless it is so large that nobody reads it."""
    documents = _collecting.get()
    if documents is not None:
        documents.append(value)
        return
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    if len(text) < READABLE:  # indenting takes ten times as long
        text = json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False)
    click.echo(spoken(text))


def print_lines(items: Iterable[Any]) -> None:
    """Print JSON documents, one a line."""
    for item in items:
        text = json.dumps({"schema": 1, **item}, ensure_ascii=True, allow_nan=False)
        click.echo(spoken(text))


def print_csv(records: Iterable[Mapping[str, Any]]) -> None:
    """Print flat rows as CSV."""
    from loratool.display.records import csv_text

    click.echo(csv_text(records), nl=False)


def show(document: Document, *, quiet: bool = False) -> None:
    """Print a document: as wide as the terminal, or in a pipe as wide as it is; then its notes."""
    if document.blocks and not quiet:
        _print(document)
    print_notes(document.notes)


def _print(document: Document) -> None:
    from loratool.display.terminal import Rendered, plain_text

    clean = writable(sys.stdout.encoding)
    if not sys.stdout.isatty():
        click.echo(plain_text(document, clean=clean))
        return
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    console.print(Rendered(document, clean), crop=False, no_wrap=True, overflow="ignore")


def print_notes(notes: Iterable[str]) -> None:
    """Print notes to standard error, one line each."""
    clean = writable(sys.stderr.encoding)
    for note in notes:
        click.echo(f"note: {clean(note)}", err=True)


@contextmanager
def progress_bar(
    words: str, *, quiet: bool, is_counted: bool = False
) -> Iterator[Callable[[int, int], None] | None]:
    """Give a function that shows progress on standard error, where that is a terminal.

    Args:
        words: What is done.
        quiet: Show nothing.
        is_counted: Whether things are counted, and not bytes; then it appears after a moment.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    begun = time.monotonic() + (MOMENT if is_counted else 0.0)
    bar: Progress | None = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        if time.monotonic() < begun:
            return
        if bar is None:  # not before: what is fetched first has a bar of its own
            bar = _bar(words, is_counted)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield update
    finally:
        if bar is not None:
            bar.stop()


def _bar(words: str, is_counted: bool) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    amount = MofNCompleteColumn() if is_counted else DownloadColumn()
    columns = (TextColumn(words), BarColumn(), amount, TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(words, total=None)
    return bar
