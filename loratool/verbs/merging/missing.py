"""What an adapter has and the base has not: all of it in one line, and how to leave it out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from os.path import commonprefix
from typing import Final

from loratool.adapter.model import Site
from loratool.base.model import Model
from loratool.errors import MissingModuleError
from loratool.verbs.merging.context import Share

__all__ = ["missing_modules", "own_name"]

NUMBER: Final = re.compile(r"(?<![0-9])[0-9]+(?![0-9])")
MOST_SHOWN: Final = 4


def missing_modules(share: Share, sites: Sequence[Site], base: Model) -> MissingModuleError:
    """Return the error that the base has none of the modules of ``sites``.

    The file's own names come first. Exactly these are what the option in the hint leaves out; where
    nothing would be left, it asks for another base instead.
    """
    adapter = share.adapter
    names = [own_name(site) for site in sites]
    what = "the base has no such module"
    if len(names) > 1:
        shown = list(dict.fromkeys(NUMBER.sub("*", name) for name in names))
        more = ", …" if len(shown) > MOST_SHOWN else ""
        listed = ", ".join(shown[:MOST_SHOWN]) + more
        what = f"the base has no such module, nor {len(names) - 1} more of the file: {listed}"
    nearest = base.nearest(sites[0].module)
    words = f" (nearest: {', '.join(nearest)})" if nearest else ""
    missing = {key for site in sites for key in _keys(site)}
    if missing == set(adapter.tensors):
        hint = "is this the base that the adapter was trained on?"
    else:
        pattern = skipping(names, missing, adapter.tensors)
        hint = f"leave {'it' if len(names) == 1 else 'them'} out with --skip {shlex.quote(pattern)}"
    return MissingModuleError(share.where(names[0]), what + words, hint=hint)


def own_name(site: Site) -> str:
    """Return what the file calls a module: what its keys have in common."""
    keys = _keys(site)
    if len(keys) == 1:
        return keys[0].rpartition(".")[0] or keys[0]
    stem = commonprefix(keys)
    return stem.rpartition(".")[0] or stem.rstrip(".:_")


def skipping(names: Sequence[str], wanted: Collection[str], keys: Collection[str]) -> str:
    """Return a regular expression that finds these keys and none of the others.

    Args:
        names: The modules that the keys are of.
        wanted: The keys.
        keys: All keys.
    """
    for pattern in _candidates(names, wanted):
        if {key for key in keys if re.search(pattern, key)} == set(wanted):
            return pattern
    return f"^({'|'.join(map(re.escape, sorted(wanted)))})$"


def _candidates(names: Sequence[str], wanted: Collection[str]) -> Iterator[str]:
    """Yield patterns, the shortest first."""
    stem = commonprefix(sorted(wanted))
    cuts = [index for index, char in enumerate(stem, 1) if char in "._:"]
    yield from (f"^{re.escape(stem[:cut])}" for cut in cuts)
    leaves = list(dict.fromkeys(re.escape(name.rpartition(".")[2]) for name in names))
    yield rf"\.{_alternatives(leaves)}\."
    forms = dict.fromkeys(NUMBER.sub("[0-9]+", re.escape(name)) for name in names)
    yield rf"^{_alternatives(list(forms))}\."


def _alternatives(forms: Sequence[str]) -> str:
    return forms[0] if len(forms) == 1 else f"({'|'.join(forms)})"


def _keys(site: Site) -> list[str]:
    return sorted(stored.spec.name for stored in site.slots.values())
