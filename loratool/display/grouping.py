"""Modules that are alike but for their numbers, shown as one row of a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

from loratool.display.folding import INDEX, fold_names, is_index

__all__ = ["group_modules", "kind_of", "layer_of", "pattern_of", "row_pattern"]

Item = TypeVar("Item")
NUMBER: Final = rf"(^|\.)({INDEX.pattern})(?=\.|$)"


def pattern_of(module: str) -> str:
    """Return a module path with ``*`` for every number in it."""
    return ".".join("*" if is_index(part) else part for part in module.split("."))


def row_pattern(module: str) -> str:
    """Return a module path with ``*`` for the first number in it."""
    return re.sub(NUMBER, r"\1*", module, count=1)


def layer_of(module: str) -> int | None:
    """Return the first number in a module path."""
    match = re.search(NUMBER, module)
    return int(match[2]) if match else None


def kind_of(module: str) -> str:
    """Return the pattern of what a module is in: ``layers.*.self_attn`` of its ``q_proj``.

    Layers of a sequence (``ff.net.0.proj``, ``ff.net.2``) are in what the sequence is in.
    """
    parts = pattern_of(module).split(".")
    inside = parts if parts[-1] == "*" else parts[:-1]
    while inside and inside[-1] == "*":
        inside = inside[:-2]
    return ".".join(inside or parts)


def group_modules(
    items: Iterable[Item], names: Sequence[str], key: Callable[[str], str] = pattern_of
) -> list[tuple[tuple[str, ...], list[Item]]]:
    """Return items whose names have one ``key`` together, with the names folded.

    Names that do not fold into one have ``*`` for every number in them.
    """
    groups: dict[str, tuple[list[str], list[Item]]] = {}
    for item, name in zip(items, names, strict=True):
        group = groups.setdefault(key(name), ([], []))
        group[0].append(name)
        group[1].append(item)
    return [(_folded(names), members) for names, members in groups.values()]


def _folded(names: Sequence[str]) -> tuple[str, ...]:
    folded = fold_names(names)
    if len(folded) > 1:
        folded = fold_names(list(dict.fromkeys(map(pattern_of, names))))
    return tuple(folded)
