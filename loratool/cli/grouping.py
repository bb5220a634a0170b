"""Modules that are alike but for their numbers, shown as one row of a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from loratool.cli.folding import fold_names

__all__ = ["group_modules", "layer_of", "pattern_of", "row_pattern", "span", "sparkline"]

Item = TypeVar("Item")
BARS = "▁▂▃▄▅▆▇█"
DECADES = 3.0
"""How far below the largest value the lowest bar of a sparkline lies, in powers of ten."""


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


def span(values: Iterable[float], style: str = ".3g") -> str:
    """Return one number, or the smallest and the largest of several."""
    known = list(values)
    if not known:
        return "-"
    low, high = format(min(known), style), format(max(known), style)
    return low if low == high else f"{low} to {high}"


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """Return a spectrum as bars on a logarithmic scale, from the largest value on."""
    import math

    if not values or not values[0]:
        return ""
    step = max(1.0, len(values) / width)
    chosen = [values[int(i * step)] for i in range(min(width, len(values)))]
    heights = [
        1 + math.log10(value / values[0]) / DECADES if value > 0 else 0.0 for value in chosen
    ]
    return "".join(BARS[round(max(0.0, height) * (len(BARS) - 1))] for height in heights)
