"""Loaders to write for, one file each. A new file with a ``LOADER`` in it is found.

Its ``CLAIM`` says by which name ``--for`` knows it; other files here are what loaders share.
"""

from __future__ import annotations

from typing import Final

from loratool.discovery import Plugins
from loratool.errors import OptionError
from loratool.loaders.loader import Loader

__all__ = ["builtin_loaders", "loader_named", "loader_names"]

FILES: Final = Plugins(__name__, "LOADER")


def loader_names() -> tuple[str, ...]:
    """Return what ``--for`` takes, sorted; no loader is imported."""
    return tuple(sorted(FILES.claimed("for")))


def builtin_loaders() -> tuple[Loader, ...]:
    """Return every loader, in the order of their names."""
    return tuple(loader_named(name) for name in loader_names())


def loader_named(name: str) -> Loader:
    """Return the loader called ``name``.

    Raises:
        OptionError: There is none.
    """
    files = FILES.claimed("for")
    if name not in files:
        raise OptionError.none_of("--for", name, loader_names())
    loader: Loader = FILES.load(files[name])
    return loader
