"""A merge as its output records it: with what ``verify`` plans it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import BaseModelError, FileFormatError, UnsupportedError
from loratool.plan.record import Input, Record, locate, read_record

__all__ = ["RecordedMerge", "recorded_merge"]


@dataclass(frozen=True, slots=True)
class RecordedMerge:
    """A merge that was carried out.

    Attributes:
        base: The base.
        adapters: The adapters, in order.
        options: What was asked for, by the names of the keywords of ``merge``.
    """

    base: Path
    adapters: tuple[Path, ...]
    options: Mapping[str, Any]


def recorded_merge(merged: Path, base: Path | None, given: Mapping[str, Any]) -> RecordedMerge:
    """Return the merge that ``merged`` records.

    Args:
        merged: A merged model.
        base: The base, where somebody says which.
        given: Options that somebody gave, which go before those that are recorded.

    Raises:
        UnsupportedError: Nothing is recorded, or another command.
        BaseModelError: An input is not there any more.
        FileFormatError: The record is damaged, or an input is another.
    """
    record = _record_of(merged)
    first, *others = record.inputs
    around = (Path.cwd(), merged.absolute().parent)
    if base is None:
        base = _found(first, "base", "--base PATH", around)
    adapters = tuple(_found(each, "adapter", "--adapter PATH", around) for each in others)
    options = dict(record.options)
    if isinstance(enabled := options.get("enable_lora"), str):
        options["enable_lora"] = tuple(part == "1" for part in enabled.split(","))
    for name in ("weights", "skip"):
        options[name] = tuple(options.get(name) or ())
    return RecordedMerge(base, adapters, options | {k: v for k, v in given.items() if v})


def _record_of(merged: Path) -> Record:
    hint = "say what it was made of: --base BASE --adapter ADAPTER"
    try:
        record = read_record(merged)
    except UnsupportedError as error:
        raise UnsupportedError(error.where, error.what, hint=hint) from None
    if record.command != "merge" or len(record.inputs) < 2:
        raise UnsupportedError(merged, f"was made by {record.command!r}, and not merged", hint=hint)
    return record


def _found(wanted: Input, what: str, option: str, around: Sequence[Path]) -> Path:
    """Return where an input lies.

    Raises:
        BaseModelError: Nowhere near.
        FileFormatError: Something else is called so.
    """
    hint = f"say where it is, with {option}"
    try:
        path = locate(wanted, around)
    except FileFormatError as error:
        raise FileFormatError(error.where, error.what, hint=hint) from None
    if path is None:
        places = " or ".join(dict.fromkeys(map(str, around)))
        raise BaseModelError(
            wanted.name, f"is the {what} that is recorded, and not found in {places}", hint=hint
        )
    return path
