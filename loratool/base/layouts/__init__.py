"""Layouts of checkpoints, one file each. A new file with a ``LAYOUT`` in it is found."""

from __future__ import annotations

from typing import Final

from loratool.base.layout import Headers, Layout
from loratool.discovery import Plugins
from loratool.errors import BaseModelError

__all__ = ["layout_of", "layouts"]

FILES: Final = Plugins(__name__, "LAYOUT")


def layouts() -> tuple[Layout, ...]:
    """Return every layout in this package, in the order of their names."""
    return tuple(sorted(FILES.all().values(), key=lambda layout: layout.name))


def layout_of(headers: Headers, where: object) -> Layout:
    """Return the layout that claims a model most specifically.

    Raises:
        BaseModelError: Two claim it alike, or none does.
    """
    claims = [(layout.claims(headers), layout) for layout in layouts()]
    best = max((claim for claim, _ in claims), default=0)
    found = [layout for claim, layout in claims if claim == best > 0]
    if len(found) != 1:
        names = ", ".join(layout.name for layout in found) or "none"
        raise BaseModelError(where, f"its layout is not clear: claimed by {names}")
    return found[0]
