"""Arguments as people give them: one path where several are meant, short names of dtypes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypeVar

from loratool.errors import OptionError, OutputError
from loratool.files.dtypes import OUTPUT_DTYPES, SHORT_DTYPES

__all__ = ["dtype_name", "one_or_more", "output_path"]

Item = TypeVar("Item")
ADDRESS: Final = re.compile(r"[a-z][a-z0-9+.-]+:/")
"""How addresses begin; a path that was made of one has lost the second slash."""


def one_or_more(given: Iterable[Item] | Item) -> tuple[Item, ...]:
    """Return several things as they are, and a text or a path as the only one of them.

    Args:
        given: One text or path, or any number of them.
    """
    found: Any = given
    return (found,) if isinstance(given, str | PathLike) else tuple(found)


def dtype_name(given: object) -> str | None:
    """Return what ``--dtype`` calls a dtype: ``bf16`` and ``torch.bfloat16`` are ``bfloat16``.

    Args:
        given: Its name, a dtype of torch, or ``None``.

    Raises:
        OptionError: Nothing is written in it.
    """
    if given is None:
        return None
    name = str(given).removeprefix("torch.")
    name = SHORT_DTYPES.get(name, name)
    if name not in OUTPUT_DTYPES:
        raise OptionError.none_of("--dtype", name, (*OUTPUT_DTYPES, *SHORT_DTYPES))
    return name


def output_path(given: str | PathLike[str]) -> Path:
    """Return where an output goes; for an address of a store, the path that stands for it.

    Raises:
        OutputError: That is standard output, or an address that nothing is written to.
    """
    path, text = Path(given), os.fspath(given)
    if ADDRESS.match(text) and not path.parent.is_dir():
        from loratool.files.places import output_in_a_store

        return output_in_a_store(text)
    if path == Path("-"):
        raise OutputError(
            "-o -",
            "an output cannot go to a pipe: its parts are written out of order, and it gets its "
            "name when all of it is there",
            hint="write a file, and pass on that: -o out.safetensors && cat out.safetensors",
        )
    return path
