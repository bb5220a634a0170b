"""Text in a given width: folded after spaces and at the joints of names, never inside a word."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

__all__ = ["INDENT", "longest_piece", "pieces", "width_of", "wrapped"]

JOINT: Final = re.compile(r"(?<=[\s/\\])(?=\S)|(?<=[^\d.]\.)(?=[^\s.])|(?<=[^.]\.)(?=[^\s\d.])")
"""Where text is folded, but for what is in braces.

Numbers (``0.25``, ``1e-05``) and ranges of them (``{0..31}``) are no joints.
"""
FINER: Final = rf"(?<=_)(?=[^_])|(?<=-)(?=[^\d-])|(?<=,)(?=\S)|{JOINT.pattern}"
"""Where pieces are folded that are wider than a line."""
INDENT: Final = "  "
"""What further lines of one text begin with."""


def width_of(text: str) -> int:
    """Return how many columns of a terminal ``text`` takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # knows how wide characters are

    return cell_len(text)


def pieces(text: str) -> Iterator[str]:
    """Yield the pieces of ``text`` that are best left whole."""
    start = last = depth = 0
    for match in JOINT.finditer(text):
        place = match.start()
        depth += text.count("{", last, place) - text.count("}", last, place)
        last = place
        if depth <= 0 or text[place - 1].isspace():
            yield text[start:place]
            start = place
    yield text[start:]


def longest_piece(text: str) -> int:
    """Return the width of the longest piece of ``text`` that is best left whole."""
    return max(width_of(piece.rstrip()) for piece in pieces(text))


def wrapped(text: str, width: int | None, indent: str = INDENT) -> list[str]:
    """Return ``text`` in lines of at most ``width`` columns; further ones begin with ``indent``.

    A word that is wider than a line is cut where the line ends.
    """
    if width is None or width_of(text) <= width:
        return [text]
    lines: list[str] = []
    line = ""
    for piece in _pieces(text, max(1, width - len(indent))):
        if line.strip() and width_of((line + piece).rstrip()) > width:
            lines.append(line.rstrip())
            line = indent
        line += piece
    return [*lines, line.rstrip()]


def _pieces(text: str, width: int) -> Iterator[str]:
    for whole in pieces(text):
        if width_of(whole.rstrip()) <= width:
            yield whole
            continue
        for part in re.split(FINER, whole):
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
