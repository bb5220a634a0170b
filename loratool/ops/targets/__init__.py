"""Loaders to write for, one file each. A new file with a ``TARGET`` in it is found."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from loratool.errors import OptionError
from loratool.ops.targets.target import Target

__all__ = ["builtin_targets", "target_named"]


@cache
def builtin_targets() -> tuple[Target, ...]:
    """Return every target in this package, in the order of their names."""
    modules = (import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__))
    found = (getattr(module, "TARGET", None) for module in modules)
    return tuple(
        sorted((item for item in found if isinstance(item, Target)), key=lambda item: item.name)
    )


def target_named(name: str) -> Target:
    """Return the target called ``name``.

    Raises:
        OptionError: There is none.
    """
    known = {target.name: target for target in builtin_targets()}
    if name not in known:
        raise OptionError("--for", f"{name!r} is none of {', '.join(known)}")
    return known[name]
