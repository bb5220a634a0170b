"""Files are opened where it is known whether they are on the disk: by ``files/sources.py``."""

from __future__ import annotations

import ast
from pathlib import Path

import loratool

ROOT = Path(loratool.__file__).parent
READERS = ("open", "read_bytes", "read_text")
ALLOWED = {
    "files/sources.py": "the one place that knows",
    "files/ranges.py": "what was fetched",
    "files/hub/remote.py": "what was fetched",
    "files/objects/store.py": "what was fetched",
    "files/objects/outputs.py": "what was staged on the disk",
    "files/hub/cache.py": "the cache's own records",
    "verbs/extraction/decomposition.py": "what an interrupted run has left",
}
ROOMS = ("files", "codecs", "adapter", "base", "variants", "schemes", "plan", "write", "verbs")


def readers(path: Path) -> list[int]:
    """Return the lines that read a file without asking where it is."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        given = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        is_reading = node.func.attr in READERS[1:] or (node.func.attr == "open" and "rb" in given)
        asked = node.func.value
        is_whole = isinstance(asked, ast.Call) and getattr(asked.func, "id", "") == "whole"
        if is_reading and not is_whole:
            found.append(node.lineno)
    return found


def test_every_reader_asks_where_a_file_is() -> None:
    found = [
        f"{name}:{line}: use opened() or whole() of files/sources.py"
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        if (name := path.relative_to(ROOT).as_posix()) not in ALLOWED
        for line in readers(path)
    ]
    assert not found
