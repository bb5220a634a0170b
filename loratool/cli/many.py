"""What several commands do with many paths: a table, a document, or a line for each."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click

from loratool.cli import render
from loratool.cli.failures import failure_of
from loratool.cli.failures import tell as tell_failure
from loratool.errors import LoratoolError, OptionError, nearest_name, printable
from loratool.verbs.many import Many, Record, Unread

__all__ = ["tell"]


def tell(
    found: Many[Any],
    *,
    is_bad: Callable[[Any], bool] = lambda one: False,
    as_json: bool = False,
    as_jsonl: bool = False,
    as_csv: bool = False,
    sort: str | None = None,
    quiet: bool = False,
) -> int:
    """Print what a verb says of many paths, and return the exit status.

    Args:
        found: What it says.
        is_bad: Whether what is said of one path means that something is wrong with it.
        as_json: Print one document.
        as_jsonl: Print one document a line; as it is read, unless rows are sorted or compared.
        as_csv: Print rows.
        sort: The column to sort by, with ``-`` before it from the largest on.
        quiet: Show no progress.

    Raises:
        OptionError: There is no such column, or several forms are asked for.
    """
    _check_forms({"--json": as_json, "--jsonl": as_jsonl, "--csv": as_csv})
    order = _order(sort, found.columns)
    is_streamed = as_jsonl and order is None and not found.compares
    rows: list[dict[str, Any]] = []
    documents: list[dict[str, Any]] = []
    unread: list[LoratoolError] = []
    count = bad = 0
    is_seen = is_streamed and sys.stdout.isatty()
    with render.progress_bar("reading", quiet=quiet or is_seen, is_counted=True) as progress:
        for place, one in found.pairs(progress):
            count += 1
            if isinstance(one, Unread):
                unread.append(one.error)
            else:
                bad += is_bad(one)
            if is_streamed:
                click.echo(json.dumps(one.as_json()))
                continue
            rows.append(dict(found.record(place, one)))
            documents.append(one.as_json() if as_json or as_jsonl else {})
    failure = _failure(unread) if len(unread) == count else None
    if not is_streamed:
        with render.progress_bar("comparing", quiet=quiet, is_counted=True) as progress:
            rows = found.compared(rows, progress)
        rows, documents = _arranged(found, rows, documents, order)
    if as_json:
        told = {"error": failure.as_json()} if failure is not None else {}
        render.print_json({"schema": 1, "items": documents, **told})
    elif as_jsonl:
        for document in documents:
            click.echo(json.dumps(document))
    elif as_csv:
        _print_csv(rows, found.columns)
    elif failure is None or count > 1:
        render.show(found.page(rows))
    render.print_notes(found.notes())
    if failure is not None:
        return tell_failure(failure_of(failure), as_json=False, debug=False)
    if unread and (as_json or as_jsonl or as_csv):
        render.print_notes([f"{len(unread)} of {count} could not be read"])
    return 1 if unread or bad else 0


def _failure(errors: Sequence[LoratoolError]) -> LoratoolError:
    """Return what to say where nothing could be read: the first reason, and how many there are."""
    first = errors[0]
    if len(errors) == 1:
        return first
    what = f"{first.what}; none of {len(errors)} could be read"
    return LoratoolError(first.where, what, hint=first.hint, code=first.code)


def _arranged(
    found: Many[Any],
    rows: list[dict[str, Any]],
    documents: Sequence[dict[str, Any]],
    order: tuple[str, bool] | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows and documents in the order that is asked for."""
    places = list(range(len(rows)))
    if order is not None:
        name, is_descending = order
        places.sort(
            key=lambda place: _rank(rows[place][name], is_descending), reverse=is_descending
        )
    rows = [rows[place] for place in places]
    return rows, [documents[p] | found.added(row) for p, row in zip(places, rows, strict=True)]


def _check_forms(forms: Mapping[str, bool]) -> None:
    asked = [name for name, is_asked in forms.items() if is_asked]
    if len(asked) > 1:
        raise OptionError(asked[1], f"not together with {asked[0]}")


def _order(sort: str | None, columns: Sequence[str]) -> tuple[str, bool] | None:
    """Return the column to sort by, and whether from the largest on."""
    if sort is None:
        return None
    name = sort.removeprefix("-")
    column = {"size": "bytes"}.get(name, name)
    if column not in columns:
        near = nearest_name(name, columns)
        hint = f"did you mean {near!r}?" if near else None
        raise OptionError("--sort", f"{name!r} is none of {', '.join(columns)}", hint=hint)
    return column, sort.startswith("-")


def _rank(value: Any, is_descending: bool) -> tuple[bool, Any]:
    """Return what a cell is sorted by: numbers as such, texts without case, nothing at the end."""
    is_nothing = value is None or value == [] or value == ""
    text = value if isinstance(value, int | float) else _text(value).casefold()
    return (is_nothing != is_descending, 0 if is_nothing else text)


def _print_csv(rows: Iterable[Record], columns: Sequence[str]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_text(row[column]) for column in columns])


def _text(value: Any) -> str:
    """Return a cell as text: lists with commas, what went wrong in its words."""
    if isinstance(value, dict):
        value = f"{value['code']} {value['message']}"
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return "" if value is None else printable(value)
