"""The front matter of a card: fields set line by line, so that everything else stays as it is.

A card is Markdown that may begin with YAML between two lines of dashes. Fields at the top are found
by their names and reach to the next one; what is inside them, comments, and fields that nobody asks
for keep their bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

__all__ = ["with_fields"]

FENCE: Final = "---"
FIELD: Final = re.compile(r"(?P<key>[A-Za-z_][\w.-]*)\s*:(?P<value>(\s.*)?)")
PLAIN: Final = re.compile(r"[A-Za-z_][\w./-]*(?:[ ][\w./-]+)*")
WORDS: Final = frozenset(("true", "false", "yes", "no", "on", "off", "null", "y", "n"))
"""What YAML takes for something else than a text."""


def with_fields(
    text: str,
    fields: Mapping[str, str],
    *,
    defaults: Mapping[str, str] | None = None,
    lists: Mapping[str, Sequence[str]] | None = None,
    stale: Mapping[str, str] | None = None,
) -> str:
    """Return ``text`` with its front matter renewed, or begun.

    Args:
        text: A card; what follows the front matter is kept, and so are its ends of lines.
        fields: What single fields say from now on.
        defaults: The same, where the card does not say anything.
        lists: Entries that lists have to have; those that they have stay.
        stale: Fields that go first, where they say just this.
    """
    ending = "\r\n" if "\r\n" in text else "\n"
    lines, body = _split(text.removeprefix("\ufeff").replace("\r\n", "\n"))
    for key, value in (stale or {}).items():
        place = _place(lines, key)
        if place is not None and _says(lines[place[0] : place[1]], value):
            del lines[place[0] : place[1]]
    for key, value in (defaults or {}).items():
        if _place(lines, key) is None:
            lines.append(f"{key}: {_scalar(value)}")
    for key, value in fields.items():
        _set(lines, key, [f"{key}: {_scalar(value)}"])
    for key, values in (lists or {}).items():
        _extend(lines, key, values)
    return "\n".join([FENCE, *lines, FENCE, body]).replace("\n", ending)


def _split(text: str) -> tuple[list[str], str]:
    """Return the lines of the front matter, none where there is none, and what follows it."""
    lines = text.split("\n")
    if lines[0].rstrip() != FENCE:
        return [], text
    for number, line in enumerate(lines[1:], 1):
        if line.rstrip() == FENCE:
            return lines[1:number], "\n".join(lines[number + 1 :])
    return [], text  # a rule, and no front matter


def _place(lines: Sequence[str], key: str) -> tuple[int, int] | None:
    """Return from where to where a field reaches."""
    for number, line in enumerate(lines):
        match = FIELD.fullmatch(line)
        if match is not None and match["key"] == key:
            end = number + 1
            while end < len(lines) and _continues(lines[end]):
                end += 1
            while end > number + 1 and not lines[end - 1].strip():
                end -= 1  # what is empty belongs to nobody
            return number, end
    return None


def _continues(line: str) -> bool:
    return not line.strip() or line[0] in " \t" or line == "-" or line.startswith("- ")


def _says(lines: Sequence[str], value: str) -> bool:
    match = FIELD.fullmatch(lines[0])
    said = (match["value"] if match is not None else "").partition(" #")[0].strip()
    return len(lines) == 1 and said.strip("\"'") == value


def _set(lines: list[str], key: str, new: Sequence[str]) -> None:
    place = _place(lines, key)
    begin, end = place if place is not None else (len(lines), len(lines))
    lines[begin:end] = new


def _extend(lines: list[str], key: str, values: Sequence[str]) -> None:
    """Add entries to a list, in the form that it has."""
    place = _place(lines, key)
    if place is None:
        lines += [f"{key}:", *(f"- {_scalar(value)}" for value in values)]
        return
    begin, end = place
    match = FIELD.fullmatch(lines[begin])
    rest = (match["value"] if match is not None else "").strip()
    entries = [line.strip()[1:].strip() for line in lines[begin + 1 : end] if line.strip()]
    if not rest or rest.startswith("#"):
        found = {entry.strip("\"'") for entry in entries}
        indent = next((line[: -len(line.lstrip())] for line in lines[begin + 1 : end] if line), "")
        more = [f"{indent}- {_scalar(value)}" for value in values if value not in found]
        lines[end:end] = more
    elif rest.startswith("[") and rest.endswith("]") and end == begin + 1:
        inside = rest[1:-1].strip()
        found = {entry.strip().strip("\"'") for entry in inside.split(",")}
        more = [_scalar(value) for value in values if value not in found]
        lines[begin] = f"{key}: [{', '.join([*([inside] if inside else []), *more])}]"


def _scalar(text: str) -> str:
    """Return a text as YAML: plain where it can be nothing else."""
    if PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return text
    plain = (
        f"\\{char}" if char in '"\\' else char if char.isprintable() else f"\\U{ord(char):08x}"
        for char in text
    )
    return f'"{"".join(plain)}"'
