"""Metadata of an input that stays true of what is written from it."""

from __future__ import annotations

import re

from loratool.adapter.model import Adapter
from loratool.schemes import builtin_schemes

__all__ = ["kept_metadata"]


def kept_metadata(adapter: Adapter) -> dict[str, str]:
    """Return what the input says about its training, and about what it shows.

    What describes the form of a file, a conversion changes; each scheme knows its own.
    """
    if not adapter.metadata:
        return {}
    forms = [s.settings.stale for s in builtin_schemes() if s.settings.stale]
    stale = re.compile("|".join(("format", r"loratool\w*", "alpha", *forms)))
    return {k: v for k, v in adapter.metadata.items() if not stale.fullmatch(k)}
