"""What stands for characters that a terminal or a pipe does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from loratool.errors import printable

__all__ = ["ASCII", "BARS", "in_ascii", "is_unicode", "writable"]

BARS: Final = "▁▂▃▄▅▆▇█"
"""Bars of a sparkline, from the lowest to the highest."""
ASCII: Final = {
    "\N{DOUBLE VERTICAL LINE}": "||",
    "\N{GREEK CAPITAL LETTER DELTA}": "delta",
    "\N{MIDDLE DOT}": "*",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{GREEK SMALL LETTER PHI}": "phi",
    "\N{GREEK CAPITAL LETTER SIGMA}": "sum of",
    "\N{SQUARE ROOT}": "sqrt ",
    "\N{SUPERSCRIPT TWO}": "^2",
    "\N{GREEK SMALL LETTER SIGMA}": "sigma",
    "\N{SUBSCRIPT ONE}": "1",
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{LESS-THAN OR EQUAL TO}": "<=",
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    **dict(zip(BARS, "_.-=+*#@", strict=True)),
}


def in_ascii(text: object) -> str:
    """Return ``text``, printable and with other characters than ASCII's replaced or escaped."""
    clean = printable(text)
    if clean.isascii():
        return clean
    return "".join(
        char
        if char.isascii()
        else ASCII.get(char) or char.encode("ascii", "backslashreplace").decode()
        for char in clean
    )


def writable(encoding: str | None) -> Callable[[object], str]:
    """Return what makes text fit for a terminal or a pipe with this encoding.

    click would write UTF-8 whatever the terminal can show.
    """
    return printable if is_unicode(encoding) else in_ascii


def is_unicode(encoding: str | None) -> bool:
    """Whether every character can be written in ``encoding``."""
    return encoding is None or "utf" in encoding.lower()
