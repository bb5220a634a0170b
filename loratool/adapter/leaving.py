"""How to leave something out of an adapter: options that find just that, and nothing else."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from os.path import commonprefix
from typing import Final

from loratool.adapter.model import Site

__all__ = ["folded", "leave_out", "option", "own_name", "pattern_for", "site_keys"]

NUMBER: Final = re.compile(r"(?<![0-9])[0-9]+(?![0-9])")
BREAKS: Final = "._:"


def leave_out(site: Site, key: str | None = None) -> str:
    """Return the hint to leave out a site, or one key of it."""
    keys = site_keys(site) if key is None else [key]
    stem = commonprefix(keys) if len(keys) > 1 else keys[0]
    ends = "|".join(re.escape(each[len(stem) :]) for each in keys)
    pattern = f"^{re.escape(stem)}({ends})$" if len(keys) > 1 else f"^{re.escape(stem)}$"
    return f"leave it out with {option('--skip', pattern)}"


def option(name: str, value: str) -> str:
    """Return an option as a shell takes it."""
    return f"{name} {shlex.quote(value)}"


def site_keys(site: Site) -> list[str]:
    """Return the keys of a site, sorted."""
    return sorted(stored.spec.name for stored in site.slots.values())


def own_name(site: Site) -> str:
    """Return what the file calls a module: what its keys have in common."""
    keys = site_keys(site)
    if len(keys) == 1:
        return keys[0].rpartition(".")[0] or keys[0]
    stem = commonprefix(keys)
    return stem.rpartition(".")[0] or stem.rstrip(BREAKS)


def folded(names: Sequence[str]) -> list[str]:
    """Return names once each, with ``*`` for numbers."""
    return list(dict.fromkeys(NUMBER.sub("*", name) for name in names))


def pattern_for(
    wanted: Collection[str], names: Collection[str], modules: Sequence[str] = ()
) -> str:
    """Return a regular expression that is found in these names and in none of the others.

    Args:
        wanted: The names: keys of tensors, or modules.
        names: All names.
        modules: The modules that wanted keys are of, where all keys of those are meant.
    """
    for pattern in _candidates(sorted(wanted), modules):
        if {name for name in names if re.search(pattern, name)} == set(wanted):
            return pattern
    exact = [re.escape(name) for name in sorted(wanted)]
    return f"^{_alternatives(exact)}$"


def _candidates(wanted: Sequence[str], modules: Sequence[str]) -> Iterator[str]:
    """Yield patterns, the shortest first."""
    if len(wanted) > 1:
        stem = commonprefix(wanted)
        cuts = [index for index, char in enumerate(stem, 1) if char in BREAKS]
        yield from (f"^{re.escape(stem[:cut])}" for cut in cuts)
        end = commonprefix([name[::-1] for name in wanted])[::-1]
        cuts = [index for index, char in enumerate(end) if char == "."]
        yield from (f"{re.escape(end[cut:])}$" for cut in cuts)
    if modules:
        leaves = dict.fromkeys(re.escape(name.rpartition(".")[2]) for name in modules)
        yield rf"\.{_alternatives(list(leaves))}\."
    for each, end in ((modules, r"\."), (wanted, "$")):
        exact = list(dict.fromkeys(map(re.escape, each)))
        forms = list(dict.fromkeys(NUMBER.sub("[0-9]+", name) for name in exact))
        if forms:
            yield f"^{_alternatives(exact if len(exact) == 1 else forms)}{end}"


def _alternatives(forms: Sequence[str]) -> str:
    return forms[0] if len(forms) == 1 else f"({'|'.join(forms)})"
