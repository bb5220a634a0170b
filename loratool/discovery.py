"""Plug-ins: one file each, found by listing their folder, imported when somebody asks for them.

A kind of plug-in is a package; each of its modules is one plug-in. Listing costs the names of
files, whether the package lies in a folder, a wheel or a zip archive. A plug-in may say as a
literal, its ``CLAIM``, what it is for; that is read from its text, and nothing is imported for it.

The environment variable ``LORATOOL_PLUGINS`` names more folders (separated like ``PATH``). The
plug-ins of a kind are in a folder of them that is called like its package: ``containers``,
``families``, ``loaders``, …
"""

from __future__ import annotations

import ast
import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Final

from loratool.errors import PluginError

__all__ = ["PLUGINS", "Plugins"]

PLUGINS: Final = "LORATOOL_PLUGINS"
"""The environment variable that names folders with plug-ins of others."""
SAID: Final = re.compile(r"^CLAIM\b", re.MULTILINE)
CLAIM: Final = re.compile(r"^CLAIM\b[^=\n]*= (\{[^\n]*\}$|\{.*?^\}$)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Plugins:
    """All plug-ins of one kind.

    Attributes:
        package: The package that they are modules of.
        attribute: What each of them holds for it.
    """

    package: str
    attribute: str

    def names(self) -> tuple[str, ...]:
        """Return the names of their files, sorted; none is imported.

        Raises:
            PluginError: Two of them have the same name.
        """
        return _listed(self.package, os.environ.get(PLUGINS, ""))

    def claims(self) -> Mapping[str, Any]:
        """Return what each says that it is for, by name; none is imported.

        A file without a claim is no plug-in, but what some have in common.

        Raises:
            PluginError: A claim is no literal.
        """
        return _claims(self.package, os.environ.get(PLUGINS, ""))

    def claimed(self, key: str) -> Mapping[str, str]:
        """Return the names of the files by what they claim under ``key``, one or several values.

        Raises:
            PluginError: Two claim the same.
        """
        return _claimed(self.package, os.environ.get(PLUGINS, ""), key)

    def load(self, name: str) -> Any:
        """Import one and return what it holds.

        Raises:
            KeyError: There is none of that name.
            PluginError: It cannot be imported, or does not hold it.
        """
        if name not in self.names():
            raise KeyError(name)
        path = f"{self.package}.{name}"
        _enter(self.package, os.environ.get(PLUGINS, ""))
        try:
            return getattr(importlib.import_module(path), self.attribute)
        except (ImportError, AttributeError, SyntaxError) as error:
            raise PluginError(path, f"is no plug-in with {self.attribute}: {error}") from error

    def all(self) -> dict[str, Any]:
        """Import them all and return what they hold, by name."""
        return {name: self.load(name) for name in self.names()}


@cache
def _listed(package: str, folders: str) -> tuple[str, ...]:
    found: dict[str, str] = {}
    for place in _places(package, folders):
        for info in iter_modules([place]):
            if info.name in found:
                raise PluginError(
                    Path(place, info.name),
                    f"is a second plug-in {info.name!r} beside that of {found[info.name]}",
                    hint="give its file another name",
                )
            found[info.name] = place
    return tuple(sorted(found))


@cache
def _places(package: str, folders: str) -> tuple[str, ...]:
    """Return where plug-ins lie: those of the package, then those of others."""
    kind = package.rpartition(".")[2]
    others = (str(Path(folder, kind)) for folder in folders.split(os.pathsep) if folder)
    return (*_own_places(package), *others)


@cache
def _own_places(package: str) -> tuple[str, ...]:
    """Return where the package itself lies, whatever else has been added to it since."""
    return tuple(importlib.import_module(package).__path__)


def _enter(package: str, folders: str) -> None:
    """Let the import system look where the plug-ins lie."""
    places = list(_places(package, folders))
    module = importlib.import_module(package)
    if list(module.__path__) != places:
        module.__path__[:] = places
        importlib.invalidate_caches()


@cache
def _claims(package: str, folders: str) -> Mapping[str, Any]:
    _enter(package, folders)
    found = {name: _claim(f"{package}.{name}") for name in _listed(package, folders)}
    return {name: claim for name, claim in found.items() if claim is not None}


@cache
def _claimed(package: str, folders: str, key: str) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for name, claim in _claims(package, folders).items():
        value = claim.get(key, ())
        for each in [value] if isinstance(value, str) else value:
            if found.setdefault(each, name) != name:
                raise PluginError(
                    f"{package}.{name}", f"claims {each!r}, which {found[each]} claims too"
                )
    return found


def _claim(path: str) -> Any:
    """Return the literal ``CLAIM`` of a module; that of one without a text is taken from it."""
    spec = find_spec(path)
    source = getattr(spec.loader, "get_source", None) if spec is not None else None
    text = source(path) if source is not None else None
    if text is None:
        return getattr(importlib.import_module(path), "CLAIM", None)
    if SAID.search(text) is None:
        return None
    match = CLAIM.search(text)
    try:
        return ast.literal_eval(match[1] if match is not None else "")
    except (ValueError, SyntaxError) as error:
        raise PluginError(path, f"has a CLAIM that is no literal: {error}") from None
