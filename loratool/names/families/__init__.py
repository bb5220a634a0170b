"""Families of diffusion models, one file each. A new file with ``FAMILIES`` in it is found.

"Hub" names are module paths of diffusers without the component's prefix; "native" names are those
of the checkpoints that the models were published in.

A file says with its ``CLAIM`` which families it holds and what the paths of their modules begin
with. It is imported where a path begins so, or a family is named: never for a language model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Final

from loratool.discovery import Plugins
from loratool.errors import OptionError
from loratool.names.family import Family

__all__ = [
    "FILES",
    "claiming",
    "claiming_flat",
    "families",
    "family_named",
    "known_families",
    "unrefined",
]

FILES: Final = Plugins(__name__, "FAMILIES")
"""The files of this folder; what follows from their names may be kept as long as they are these."""


def families() -> tuple[Family, ...]:
    """Return every family; all their files are imported."""
    return tuple(family for name in FILES.names() for family in _held(FILES.names(), name))


def known_families() -> tuple[str, ...]:
    """Return the names of the families whose modules have two names; no file is imported."""
    return tuple(sorted(FILES.claimed("families")))


def family_named(name: str) -> Family:
    """Return the family called ``name``.

    Raises:
        OptionError: There is none.
    """
    file = FILES.claimed("families").get(name)
    for family in _held(FILES.names(), file) if file is not None else ():
        if family.name == name:
            return family
    raise OptionError.none_of("--family", name, known_families())


def claiming(modules: Iterable[str]) -> tuple[Family, ...]:
    """Return the families that may have some of these modules, told by how their paths begin.

    Args:
        modules: Paths without component, in either naming.
    """
    names = FILES.names()
    table = _files_by_segment(names)
    files = {file for module in modules for file in table.get(module.partition(".")[0], ())}
    return tuple(family for file in sorted(files) for family in _held(names, file))


def claiming_flat(flat: str) -> tuple[Family, ...]:
    """Return the same for a flattened path."""
    names = FILES.names()
    table = _files_by_segment(names)
    longest = _most_words(names)
    words = flat.split("_", longest)[:longest]
    files = {
        file
        for count in range(1, len(words) + 1)
        for file in table.get("_".join(words[:count]), ())
    }
    return tuple(family for file in sorted(files) for family in _held(names, file))


def unrefined(found: Collection[Family], modules: Collection[str] = ()) -> list[Family]:
    """Return which of the families are meant that have the same modules of an adapter.

    What fits models of several depths is that one's whose last block it reaches, since adapters
    seldom leave out every block from some one on; and none that refines another one of them.

    Args:
        found: The families.
        modules: The modules, in either naming.
    """
    names = {family.name for family in found}
    left = [family for family in found if family.refines not in names]
    reached = [family for family in left if any(map(family.is_last, modules))]
    return [family for family in left if family in reached or not (reached and family.is_stacked)]


@cache
def _held(names: tuple[str, ...], file: str) -> tuple[Family, ...]:
    held: tuple[Family, ...] = FILES.load(file)
    return held


@cache
def _files_by_segment(names: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, list[str]] = defaultdict(list)
    for file, claim in FILES.claims().items():
        for segment in claim["segments"]:
            found[segment].append(file)
    return {segment: tuple(files) for segment, files in found.items()}


@cache
def _most_words(names: tuple[str, ...]) -> int:
    return max((each.count("_") + 1 for each in _files_by_segment(names)), default=0)
