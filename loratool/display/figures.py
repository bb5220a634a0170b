"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from loratool.display.characters import BARS

__all__ = ["counted", "human_bytes", "human_count", "span", "sparkline"]

DECADES: Final = 3.0
"""How far below the largest value the lowest bar of a sparkline lies, in powers of ten."""


def human_bytes(count: int) -> str:
    """Return a size in decimal units, as file managers show it."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def human_count(count: int) -> str:
    """Return a number with thousands apart."""
    return f"{count:,}"


def counted(count: int, noun: str) -> str:
    """Return a number of things: ``1 module``, ``2 modules``."""
    return f"{human_count(count)} {noun}{'s' * (count != 1)}"


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
