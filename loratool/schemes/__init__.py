"""Key schemes, one file each. A new file with a ``SCHEME`` in it is found; no list is edited."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from loratool.adapter.scheme import KeyScheme

__all__ = ["builtin_schemes", "scheme_named"]


@cache
def builtin_schemes() -> tuple[KeyScheme, ...]:
    """Return every scheme in this package, in the order of their names."""
    modules = (import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__))
    return tuple(sorted((module.SCHEME for module in modules), key=lambda scheme: scheme.name))


def scheme_named(name: str) -> KeyScheme:
    """Return the scheme called ``name``.

    Raises:
        KeyError: There is none.
    """
    return {scheme.name: scheme for scheme in builtin_schemes()}[name]
