"""The JSON Schema of what each command prints with ``--json``; ``schemas/`` holds one a file.

``"also"`` in one names others that the command prints too, with some of its options.
"""

from __future__ import annotations

import json
from pkgutil import get_data
from typing import Any

__all__ = ["json_schema"]


def json_schema(command: str) -> dict[str, Any]:
    """Return the schema of every document that a command may print, that of a failure included.

    Args:
        command: Its name.

    Raises:
        FileNotFoundError: It prints none.
    """
    own = _read(command)
    dialect, title = own.pop("$schema"), own.pop("title")
    others = [_read(name) for name in (*own.pop("also", ()), "error")]
    for other in others:
        del other["$schema"]
    return {"$schema": dialect, "title": title, "anyOf": [*own.pop("anyOf", [own]), *others]}


def _read(name: str) -> dict[str, Any]:
    data = get_data("loratool.cli", f"schemas/{name}.json")
    assert data is not None
    found: dict[str, Any] = json.loads(data)
    return found
