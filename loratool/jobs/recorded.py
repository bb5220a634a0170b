"""``recipe``: the recipe that an output carries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

from loratool.display.document import Document, Lines
from loratool.display.shown import Shown
from loratool.errors import FileFormatError, UnsupportedError, printable
from loratool.plan.recipe_text import ARGUMENTS, format_step, step_of
from loratool.plan.record import Input, Record, locate, read_record

__all__ = ["RecordedRecipe", "recipe"]

AnyPath = str | PathLike[str]
PATHS: Final = ("base", "initial", "spectrum")
"""Options that are paths of further inputs."""


@dataclass(frozen=True, slots=True)
class RecordedRecipe(Shown):
    """The recipe of an output.

    Attributes:
        path: The output.
        record: What it records.
        step: The step that makes it again, with paths as far as they were found.
        missing: Inputs that were not found, by name.
    """

    path: Path
    record: Record
    step: Mapping[str, Any]
    missing: tuple[str, ...] = ()

    @property
    def toml(self) -> str:
        """The recipe, which :func:`loratool.run` carries out."""
        lost = "".join(f"# not found near here: {printable(name)}\n" for name in self.missing)
        return f"# {self.record.version_line}\n{lost}{format_step(self.step)}"

    def document(self) -> Document:
        """Return what people see of it: the recipe."""
        return Document.of([Lines(tuple(self.toml.splitlines()))])

    def as_json(self) -> dict[str, Any]:
        """Return a document for scripts."""
        return {
            "schema": 1,
            "path": str(self.path),
            "command": self.record.command,
            "version": self.record.version,
            "inputs": [
                {
                    "name": each.name,
                    "sha256": each.sha256,
                    "headers_sha256": each.headers_sha256,
                }
                for each in self.record.inputs
            ],
            "options": dict(self.record.options),
            "missing": list(self.missing),
            "recipe": self.toml,
        }


def recipe(output: AnyPath, *, folder: AnyPath | None = None) -> RecordedRecipe:
    """Return the recipe that made ``output``, from what it records of itself.

    Inputs are recorded by name and digest. They are looked for in and below the working folder and
    the folder of the output, and written as paths where they are found.

    Args:
        output: What a command of loratool has written.
        folder: Where the recipe will lie, where relative paths begin; by default here.

    Raises:
        UnsupportedError: Nothing is recorded, or something that no command does.
        FileFormatError: The record is damaged.
    """
    path = Path(output)
    record = read_record(path)
    if record.command not in ARGUMENTS:
        raise UnsupportedError(path, f"was made by {record.command!r}, which is no command")
    start = Path(folder) if folder is not None else Path()
    around = (Path.cwd(), path.absolute().parent)
    missing: list[str] = []

    def found(wanted: Input) -> str:
        try:
            place = locate(wanted, around)
        except FileFormatError:
            place = None
        if place is None:
            missing.append(wanted.name)
            return wanted.name
        return wanted.name if "/" in wanted.name else _relative(place, start)

    step = step_of(
        {
            "command": record.command,
            "inputs": [
                {
                    "name": found(each),
                    "sha256": each.sha256,
                    "headers_sha256": each.headers_sha256,
                }
                for each in record.inputs
            ],
            "options": {
                key: found(Input(value)) if key in PATHS and isinstance(value, str) else value
                for key, value in record.options.items()
            },
        }
    )
    digests = {key: step.pop(key) for key in list(step) if key.endswith("_sha256")}
    step["output"] = _relative(path, start)
    return RecordedRecipe(path, record, step | digests, tuple(dict.fromkeys(missing)))


def _relative(path: Path, start: Path) -> str:
    """Return a path as it is written in a recipe in ``start``: relative where it is below that."""
    absolute, root = (Path(os.path.abspath(each)) for each in (path, start))  # noqa: PTH100
    return str(absolute.relative_to(root) if absolute.is_relative_to(root) else absolute)
