"""Modules that are alike but for their numbers, shown as one row of a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from loratool.display.folding import fold_names

__all__ = ["group_modules", "layer_of", "pattern_of", "row_pattern"]

Item = TypeVar("Item")


def pattern_of(module: str) -> str:
    """Return a module path with ``*`` for every number in it."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def row_pattern(module: str) -> str:
    """Return a module path with ``*`` for the first number in it."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module, count=1)


def layer_of(module: str) -> int | None:
    """Return the first number in a module path."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return int(match[1]) if match else None


def group_modules(
    items: Iterable[Item], names: Sequence[str]
) -> list[tuple[tuple[str, ...], list[Item]]]:
    """Return items whose names have one pattern together, with the names folded."""
    groups: dict[str, tuple[list[str], list[Item]]] = {}
    for item, name in zip(items, names, strict=True):
        group = groups.setdefault(pattern_of(name), ([], []))
        group[0].append(name)
        group[1].append(item)
    return [(tuple(fold_names(names)), members) for names, members in groups.values()]
