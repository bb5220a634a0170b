"""What an adapter has and the base has not: all of it in one line, and how to leave it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loratool.adapter.leaving import folded, option, own_name, pattern_for, site_keys
from loratool.adapter.model import Site
from loratool.base.model import Model
from loratool.errors import MissingModuleError
from loratool.verbs.merging.context import Share

__all__ = ["missing_modules"]

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
        shown = folded(names)
        listed = ", ".join(shown[:MOST_SHOWN]) + (", …" if len(shown) > MOST_SHOWN else "")
        what = f"the base has no such module, nor {len(names) - 1} more of the file: {listed}"
    nearest = base.nearest(sites[0].module)
    words = f" (nearest: {', '.join(nearest)})" if nearest else ""
    missing = {key for site in sites for key in site_keys(site)}
    if missing == set(adapter.tensors):
        hint = "is this the base that the adapter was trained on?"
    else:
        pattern = pattern_for(missing, adapter.tensors, names)
        what_to = "it" if len(names) == 1 else "them"
        hint = f"leave {what_to} out with {option('--skip', pattern)}"
    return MissingModuleError(share.where(names[0]), what + words, hint=hint)
