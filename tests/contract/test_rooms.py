"""What a scheme knows stays in its file: nothing outside asks which scheme it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import loratool
from loratool.schemes import scheme_names

ROOT = Path(loratool.__file__).parent
ROOMS = (ROOT / "schemes",)
FLAGS = ("ScaleRule", "Spelling", "Embeddings")
"""What schemes once said by members of an enumeration, and everybody else branched on."""


def outside() -> Iterator[Path]:
    """Yield the modules that are no scheme's."""
    for path in sorted(ROOT.rglob("*.py")):
        if not any(room in path.parents for room in ROOMS):
            yield path


def asked(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield where a text is compared with something, and the text."""
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.match_case):
            parts = [node.pattern]
        for part in parts:
            for inner in ast.walk(part):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield inner.lineno, inner.value


def test_no_name_of_a_scheme_is_compared_outside() -> None:
    names = set(scheme_names())
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path in outside()
        for line, text in asked(ast.parse(path.read_text("utf-8")))
        if text in names
    ]
    assert not found


def test_no_scheme_says_what_it_is_by_a_flag() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {flag}"
        for path in sorted(ROOT.rglob("*.py"))
        for flag in FLAGS
        if f"{flag}." in path.read_text("utf-8")
    ]
    assert not found


def test_only_its_own_room_imports_a_scheme() -> None:
    modules = {f"loratool.schemes.{name.replace('-', '_')}" for name in scheme_names()}
    found = [
        f"{path.relative_to(ROOT)}: {node.module}"
        for path in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module in modules
    ]
    assert not found
