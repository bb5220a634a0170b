"""Text in a given width: folded after spaces and at the joints of names, never inside a word."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

__all__ = ["INDENT", "longest_piece", "width_of", "wrapped"]

JOINTS: Final = (
    re.compile(r"(?<=[\s/\\])(?=\S)|(?<=[^\d.]\.)(?=[^\s.])|(?<=[^.]\.)(?=[^\s\d.])"),
    re.compile(r"(?<=_)(?=[^_])|(?<=-)(?=[^\d-])|(?<=,)(?=\S)"),
)
"""Where text is folded, and where its pieces are that are still too wide.

Numbers (``0.25``, ``1e-05``) and ranges of them (``{0..31}``) are no joints.
"""
INDENT: Final = "  "
"""What further lines of one text begin with."""


def width_of(text: str) -> int:
    """Return how many columns of a terminal ``text`` takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # knows how wide characters are

    return cell_len(text)


def longest_piece(text: str) -> int:
    """Return the width of the longest piece of ``text`` that is best left whole."""
    return max(width_of(piece.rstrip()) for piece in JOINTS[0].split(text))


def wrapped(text: str, width: int | None) -> list[str]:
    """Return ``text`` in lines of at most ``width`` columns; the second and further are indented.

    A word that is wider than a line is cut where the line ends.
    """
    if width is None or width_of(text) <= width:
        return [text]
    lines: list[str] = []
    line = ""
    for piece in _pieces(text, max(1, width - len(INDENT))):
        if line.strip() and width_of((line + piece).rstrip()) > width:
            lines.append(line.rstrip())
            line = INDENT
        line += piece
    return [*lines, line.rstrip()]


def _pieces(text: str, width: int) -> Iterator[str]:
    for whole in JOINTS[0].split(text):
        if width_of(whole.rstrip()) <= width:
            yield whole
            continue
        for part in JOINTS[1].split(whole):
            yield from _cut(part, width)


def _cut(text: str, width: int) -> Iterator[str]:
    """Yield a word in parts that fit a line."""
    while width_of(text.rstrip()) > width:
        end = min(width, len(text))
        while end > 1 and width_of(text[:end]) > width:
            end -= 1
        yield text[:end]
        text = text[end:]
    yield text
