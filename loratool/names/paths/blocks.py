"""The blocks of a vision transformer, in order: what numbered factors of research code mean."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.errors import UnsupportedError
from loratool.names.paths.component import EachAlone

__all__ = ["BlockPaths"]

FUSED: Final = re.compile(
    r"(?P<before>.*\.)?(?P<number>[0-9]{1,9})\.(attn|attention)\.(qkv|Wqkv|c_attn)"
)


@dataclass(frozen=True)
class BlockPaths(EachAlone):
    """Numbers of blocks whose projection of queries, keys and values is adapted."""

    keeps_unknown: bool = True

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Refuse to.

        Raises:
            UnsupportedError: In any case.
        """
        raise UnsupportedError(module, "has no number in files of numbered factors")

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return the projections of the base, where it has as many as are adapted."""
        groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for path in base:
            match = FUSED.fullmatch(path)
            if match is not None:
                groups[match["before"] or ""].append((int(match["number"]), path))
        fitting = [group for group in groups.values() if len(group) == len(sites)]
        found: dict[str, tuple[str, ...]] = {site.module: () for site in sites}
        if len(fitting) == 1:
            ordered = [path for _, path in sorted(fitting[0])]
            numbered = sorted(sites, key=lambda site: int(site.module))
            found = {s.module: (path,) for s, path in zip(numbered, ordered, strict=True)}
        return Names(found)

    def refusal(self, count: int) -> str | None:
        """Return what is missing."""
        return (
            f"{count} blocks are numbered, and have no names: give --base BASE, a model with as "
            "many projections of queries, keys and values in one (which of more blocks were "
            "adapted the file does not say)"
        )
