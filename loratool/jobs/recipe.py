"""Recipes: commands in a TOML file, one after the other."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Final

from loratool.errors import FileFormatError, OptionError, unreadable
from loratool.files.missing import missing
from loratool.jobs.step import Step, step_from

__all__ = ["STDIN", "Recipe", "read_recipe"]

STDIN: Final = "-"
LARGEST: Final = 16 << 20
TABLE: Final = re.compile(r"\s*\[\[\s*[\"']?step[\"']?\s*\]\]")
KNOWN: Final = ("schema", "step")
SCHEMA: Final = 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """Commands that are carried out one after the other.

    Attributes:
        name: What it is called in messages.
        steps: The commands.
        folder: Where its relative paths begin: where it lies.
    """

    name: str
    steps: tuple[Step, ...]
    folder: Path


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Args:
        path: The file; ``-`` for standard input, whose paths begin in the working folder.

    Raises:
        FileFormatError: It cannot be read, or is no TOML.
        OptionError: It is no recipe.
    """
    is_piped = str(path) == STDIN
    name = "standard input" if is_piped else str(path)
    try:
        data = sys.stdin.buffer.read() if is_piped else _bytes(path)
    except FileNotFoundError:
        raise missing(path) from None
    except IsADirectoryError:
        raise FileFormatError(
            path, "is a folder, expected a TOML file", hint=f"loratool recipe {quote(str(path))}"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        text = data.decode("utf-8-sig")
        document = tomllib.loads(text)
    except UnicodeDecodeError:
        raise FileFormatError(name, "is not UTF-8 text") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FileFormatError(name, f"is not valid TOML: {error}") from None
    folder = Path() if is_piped else path.parent
    return Recipe(name, tuple(_steps(document, text, name)), folder)


def _bytes(path: Path) -> bytes:
    if path.stat().st_size > LARGEST:
        raise FileFormatError(path, f"is larger than {LARGEST >> 20} MiB, and no recipe")
    return path.read_bytes()


def _steps(document: Mapping[str, Any], text: str, name: str) -> Iterator[Step]:
    """Yield the steps of a document.

    Raises:
        OptionError: It has none, or something else.
    """
    if document.get("schema", SCHEMA) != SCHEMA:
        raise OptionError(name, f"has the schema {document['schema']!r}; this version knows 1")
    tables = document.get("step")
    if tables is None and ("verb" in document or "command" in document):
        yield step_from({k: v for k, v in document.items() if k != "schema"}, name)
        return
    strange = next((key for key in document if key not in KNOWN), None)
    if strange is not None:
        raise OptionError(
            f"{name}: line {_line_of(text, strange)}",
            f"{strange!r} belongs to no step",
            hint="begin each step with [[step]], and write verb = ... below it",
        )
    if not isinstance(tables, list) or not tables:
        raise OptionError(name, "has no steps", hint="begin each step with [[step]]")
    lines = [number for number, line in enumerate(text.splitlines(), 1) if TABLE.match(line)]
    for number, table in enumerate(tables, 1):
        line = f"line {lines[number - 1]}, " if len(lines) == len(tables) else ""
        yield step_from(table, f"{name}: {line}step {number}")


def _line_of(text: str, key: str) -> int:
    """Return the line that begins with a key, as far as that can be told."""
    pattern = re.compile(rf"\s*(\[+\s*)?[\"']?{re.escape(key)}[\"']?\s*[\]=.]")
    found = (number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line))
    return next(found, 1)
