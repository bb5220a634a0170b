"""Find the base's module that an adapter means, by its path: one candidate or an error."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Final

from loratool.errors import BaseModelError
from loratool.names.canonical import STRUCTURE, canonical_path, single_towers

__all__ = ["ModuleIndex"]

ENDING: Final = 3
"""Components of a path that narrow it down to few: a layer's number, and two names."""


def _ending(path: str) -> str:
    return ".".join(path.rsplit(".", ENDING)[-ENDING:])


class ModuleIndex:
    """All module paths of a base, and the parameters of each.

    Args:
        names: The base's tensor names.
        model_types: What the base's configuration says it is.
    """

    def __init__(self, names: Iterable[str], model_types: frozenset[str] = frozenset()) -> None:
        self.towers = single_towers(model_types)
        self.parameters: dict[str, list[str]] = defaultdict(list)
        for name in names:
            module, _, leaf = name.rpartition(".")
            self.parameters[module].append(leaf)

    @cached_property
    def paths(self) -> frozenset[str]:
        """Every module path, those of containers included."""
        found: set[str] = set()
        for module in self.parameters:
            path = module
            while path and path not in found:
                found.add(path)
                path = path.rpartition(".")[0]
        return frozenset(found)

    @cached_property
    def _canonical(self) -> dict[str, list[str]]:
        found = defaultdict(list)
        for path in sorted(self.paths):
            found[canonical_path(path, self.towers)].append(path)
        return found

    @cached_property
    def _endings(self) -> dict[str, list[str]]:
        """Canonical paths by their last components."""
        found = defaultdict(list)
        for canonical in self._canonical:
            found[_ending(canonical)].append(canonical)
        return found

    def _ending_with(self, canonical: str) -> list[str]:
        """Return the paths whose canonical spelling ends with ``canonical``."""
        is_long = canonical.count(".") >= ENDING - 1
        pool = self._endings.get(_ending(canonical), ()) if is_long else self._canonical
        tail = f".{canonical}"
        matching = [found for found in pool if found == canonical or found.endswith(tail)]
        return [path for found in matching for path in self._canonical[found]]

    def _candidates(self, module: str) -> Iterator[Iterable[str]]:
        """Yield the modules that ``module`` may be, the likeliest first."""
        canonical = canonical_path(module, self.towers)
        yield self._canonical.get(canonical, ())
        yield self._ending_with(canonical)
        # A path with more before it than the base's: a prefix that the base was saved without.
        outer, _, rest = canonical.partition(".")
        while rest and outer not in STRUCTURE:
            yield self._canonical.get(rest, ())
            outer, _, rest = rest.partition(".")

    def find(self, module: str, *, parameter: str | None = None) -> str | None:
        """Return the base's spelling of ``module``, or ``None`` where it has none.

        Tried in turn: the path itself, the same path but for wrappers and library versions,
        and one path ending with the other. Each step must leave exactly one candidate.

        Args:
            module: The adapter's spelling.
            parameter: Consider only modules that have a parameter of this name.

        Raises:
            BaseModelError: Several modules could be meant; the message lists them.
        """

        def fits(path: str) -> bool:
            return parameter is None or parameter in self.parameters.get(path, ())

        if module in self.paths and fits(module):
            return module
        for candidates in self._candidates(module):
            fitting = [path for path in candidates if fits(path)]
            if len(fitting) > 1:
                listed = ", ".join(fitting[:4])
                raise BaseModelError(
                    module,
                    f"could be any of {len(fitting)} modules of the base: {listed}",
                    code="LT022",
                )
            if fitting:
                return fitting[0]
        return None

    def nearest(self, module: str) -> list[str]:
        """Return the base's module paths that look most like ``module``."""
        leaf = module.rpartition(".")[2]
        pool = [path for path in self.parameters if path.rpartition(".")[2] == leaf]
        pool = pool or list(self.parameters)
        return difflib.get_close_matches(module, pool[:5000], n=3, cutoff=0.3)
