"""Strict JSON: no duplicate keys, no NaN, bounded size and depth."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from loratool.errors import FileFormatError, unreadable
from loratool.files.sources import opened, size_of

__all__ = ["as_text", "is_text", "parse_json", "read_json_object"]

MAX_SIDECAR_BYTES: Final = 64 << 20
"""No config or index is larger; a hostile one is not read into memory."""

SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
LFS_PREFIX: Final = b"version https://git-lfs"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} occurs twice")
        found[key] = value
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def is_text(text: str) -> bool:
    """Whether it can be written; halves of surrogate pairs, which JSON can spell, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_text(name: str) -> str:
    """Return a name, such as that of a file, with marks in place of what is no text."""
    return name.encode("utf-8", "replace").decode()


def parse_json(
    data: bytes, *, where: object, allow_constants: bool = False, allow_halves: bool = False
) -> Any:
    """Parse ``data``, refusing duplicate keys.

    Args:
        data: UTF-8 text; a byte order mark is tolerated.
        where: What the text is, for the error message.
        allow_constants: Accept ``NaN`` and ``Infinity``, which Python writes into configs.
        allow_halves: Accept halves of surrogate pairs, which stand for bytes of names of files.

    Raises:
        FileFormatError: The text is not JSON by these rules.
    """
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=None if allow_constants else _no_constant,
        )
        if (
            not allow_halves
            and "\\u" in text
            and SURROGATE.search(text)
            and not is_text(json.dumps(value, ensure_ascii=False))
        ):
            raise ValueError("half of a surrogate pair, which is not text")
        return value
    except UnicodeDecodeError as error:
        raise FileFormatError(where, f"not UTF-8 text: {error.reason}") from None
    except RecursionError:
        raise FileFormatError(where, "nested too deeply to be what it should be") from None
    except ValueError as error:
        raise FileFormatError(where, f"not valid JSON: {error}") from None


def read_json_object(path: Path, *, allow_halves: bool = False) -> dict[str, Any]:
    """Read a sidecar such as ``config.json``.

    Args:
        path: Where it is.
        allow_halves: As of :func:`parse_json`.

    Raises:
        FileFormatError: Unreadable, a git-LFS pointer, not JSON, or not an object.
    """
    try:
        if size_of(path) > MAX_SIDECAR_BYTES:
            raise FileFormatError(path, f"larger than {MAX_SIDECAR_BYTES >> 20} MiB")
        with opened(path) as file:
            data = file.read()
    except OSError as error:
        raise unreadable(path, error) from None
    if data.startswith(LFS_PREFIX):
        raise FileFormatError(
            path, "a git-LFS pointer, not the file itself", hint="fetch it with 'git lfs pull'"
        )
    value = parse_json(data, where=path, allow_constants=True, allow_halves=allow_halves)
    if not isinstance(value, dict):
        raise FileFormatError(path, f"expected a JSON object, found {type(value).__name__}")
    return value
