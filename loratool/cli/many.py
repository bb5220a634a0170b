"""What several commands do with many paths: a table, a document, or a line for each."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click

from loratool.cli import render
from loratool.cli.failures import FAILURE
from loratool.errors import OptionError, nearest_name, printable
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
) -> int:
    """Print what a verb says of many paths, and return the exit status.

    Args:
        found: What it says.
        is_bad: Whether what is said of one path means that something is wrong with it.
        as_json: Print one document.
        as_jsonl: Print one document a line; as it is read, unless rows are sorted or compared.
        as_csv: Print rows.
        sort: The column to sort by, with ``-`` before it from the largest on.

    Raises:
        OptionError: There is no such column, or several forms are asked for.
    """
    _check_forms({"--json": as_json, "--jsonl": as_jsonl, "--csv": as_csv})
    order = _order(sort, found.columns)
    is_streamed = as_jsonl and order is None and not found.compares
    rows: list[dict[str, Any]] = []
    documents: list[dict[str, Any]] = []
    count = bad = unread = 0
    for place, one in found.pairs():
        count += 1
        unread += isinstance(one, Unread)
        bad += not isinstance(one, Unread) and is_bad(one)
        if is_streamed:
            click.echo(json.dumps(one.as_json()))
            continue
        rows.append(dict(found.record(place, one)))
        documents.append(one.as_json() if as_json or as_jsonl else {})
    rows = found.compared(rows)
    places = list(range(len(rows)))
    if order is not None:
        column, is_descending = order
        places.sort(
            key=lambda index: _rank(rows[index][column], is_descending), reverse=is_descending
        )
    rows = [rows[index] for index in places]
    documents = [
        documents[index] | found.added(row) for index, row in zip(places, rows, strict=True)
    ]
    if as_json:
        render.print_json({"schema": 1, "items": documents})
    elif as_jsonl:
        for document in documents if not is_streamed else ():
            click.echo(json.dumps(document))
    elif as_csv:
        _print_csv(rows, found.columns)
    else:
        render.show(found.page(rows))
    if unread and (as_json or as_jsonl or as_csv):
        render.print_notes([f"{unread} of {count} could not be read"])
    render.print_notes(found.notes())
    return FAILURE if unread == count else 1 if unread or bad else 0


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
