"""Sizes and counts as people write them."""

from __future__ import annotations

__all__ = ["human_bytes", "human_count"]


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
