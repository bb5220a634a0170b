"""The plain top-level fields of a YAML file: what tools write of numbers, texts and switches.

Nothing else of the language is read. Nested blocks, lists and multi-line texts are stepped over;
tags, anchors and aliases have no meaning here. A file that is JSON is read as such.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from loratool.errors import FileFormatError, unreadable
from loratool.files.json import MAX_SIDECAR_BYTES, parse_json
from loratool.files.sources import opened, size_of

__all__ = ["read_flat_yaml", "read_front_matter"]

MAX_CARD_BYTES: Final = 1 << 16
"""No front matter is longer."""

FIELD: Final = re.compile(
    r"(?P<key>[A-Za-z_][\w.-]*|\"[^\"\\]*\"|'[^']*')\s*:(?:\s+(?P<value>.*))?"
)
ITEM: Final = re.compile(r"\s*-\s+(?P<value>.*)")
NUMBER: Final = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
WORDS: Final[dict[str, Any]] = {
    "": None,
    "~": None,
    **dict.fromkeys(("null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE", "yes", "on"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "off"), False),
}
MARKS: Final = tuple("!&*|>{[@`%")
"""What the values begin with that are not plain."""


def read_flat_yaml(path: Path) -> dict[str, Any]:
    """Return the fields at the top of a YAML file whose values are one plain line.

    Raises:
        FileFormatError: It is none, or has a field twice.
    """
    try:
        if size_of(path) > MAX_SIDECAR_BYTES:
            raise FileFormatError(path, f"larger than {MAX_SIDECAR_BYTES >> 20} MiB")
        with opened(path) as file:
            data = file.read()
    except OSError as error:
        raise unreadable(path, error) from None
    if data.lstrip().startswith(b"{"):
        value = parse_json(data, where=path)
        return value if isinstance(value, dict) else {}
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise FileFormatError(path, "not UTF-8 text") from None
    found: dict[str, Any] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line[0] in " \t#-" or line.startswith(("...", "%")):
            continue  # what is inside something, a comment, or where a document begins
        match = FIELD.fullmatch(line.rstrip())
        if match is None:
            raise FileFormatError(path, f"line {number} is no field: {line[:60]!r}")
        key = match["key"].strip("\"'")
        if key in found:
            raise FileFormatError(path, f"line {number} has the field {key!r} again")
        found[key] = _plain(match["value"] or "")
    return found


def _plain(text: str) -> Any:
    """Return a value as what it says; ``None`` where it is not plain."""
    text = text.strip()
    quote = text[:1]
    if quote and quote in "\"'":
        end = text.find(quote, 1)
        rest = text[end + 1 :].strip()
        is_whole = end > 0 and (not rest or rest.startswith("#")) and "\\" not in text
        return text[1:end] if is_whole else None
    if text.startswith(MARKS):
        return None
    text = re.split(r"\s#", text, maxsplit=1)[0].strip()
    if text in WORDS:
        return WORDS[text]
    if NUMBER.fullmatch(text):
        return int(text) if re.fullmatch(r"[-+]?\d{1,18}", text) else float(text)
    return text


def read_front_matter(path: Path) -> dict[str, Any]:
    """Return the plain fields, and lists of such, between the dashes at the top of a Markdown file.

    What is neither is stepped over: a card is for people, and may hold anything.

    Raises:
        FileFormatError: It cannot be read, or is no text.
    """
    try:
        with opened(path) as file:
            data = file.read(MAX_CARD_BYTES)
        text = data.decode("utf-8-sig", "strict" if len(data) < MAX_CARD_BYTES else "replace")
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError:
        raise FileFormatError(path, "not UTF-8 text") from None
    first, *lines = text.splitlines() or [""]
    found: dict[str, Any] = {}
    if first.rstrip() != "---":
        return found
    key = ""
    for line in lines:
        if line.rstrip() in ("---", "..."):
            return found
        item = ITEM.fullmatch(line.rstrip())
        if item is not None and isinstance(found.get(key), list):
            found[key].append(_plain(item["value"]))
        elif (match := FIELD.fullmatch(line.rstrip())) is not None:
            key, value = match["key"].strip("\"'"), (match["value"] or "").strip()
            is_flow = value.startswith("[") and value.endswith("]") and "{" not in value
            items = [_plain(word) for word in value[1:-1].split(",")] if is_flow else []
            found.setdefault(key, items if is_flow or not value else _plain(value))
    return {}  # the dashes at the end are missing, so nothing says where it ends
