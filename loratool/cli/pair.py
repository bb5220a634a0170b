"""``KEY=VALUE`` on a command line, whose value may be what a file or standard input holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import click

from loratool.errors import FileFormatError, OptionError, printable, unreadable

__all__ = ["Pair"]

FROM_FILE: Final = "@"
FROM_STDIN: Final = "-"
LARGEST: Final = 64 << 20


class Pair(click.ParamType[str]):
    """A key and what is said under it; nothing is read before :meth:`read` is called."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        key, equals, _ = str(value).partition("=")
        if not equals or not key:
            self.fail(f"'{printable(value)}'; expected KEY=VALUE", param, ctx)
        return str(value)

    @staticmethod
    def read(pairs: tuple[str, ...]) -> dict[str, str]:
        """Return what is to be said, by key.

        Raises:
            OptionError: A key is given twice, or a file is too large.
            FileFormatError: A file is no text, or cannot be read.
        """
        found: dict[str, str] = {}
        for text in pairs:
            key, _, said = text.partition("=")
            if key in found:
                raise OptionError("--set", f"{key!r} is given twice")
            found[key] = _said(said)
        return found

    @staticmethod
    def placed(text: str, folder: Path) -> str:
        """Return ``text`` with a file in it that lies relative to ``folder``."""
        key, equals, said = text.partition("=")
        file = said.removeprefix(FROM_FILE)
        if file == said or file.startswith(FROM_FILE):
            return text
        return f"{key}{equals}{FROM_FILE}{folder / file}"


def _said(text: str) -> str:
    """Return a value, or what the file holds that it names."""
    if text == FROM_STDIN:
        return sys.stdin.read()
    if not text.startswith(FROM_FILE):
        return text
    if text.startswith(2 * FROM_FILE):
        return text[1:]
    path = Path(text[1:])
    try:
        if path.stat().st_size > LARGEST:
            raise OptionError("--set", f"{path} is larger than {LARGEST >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError:
        raise FileFormatError(path, "not UTF-8 text, as metadata are") from None
