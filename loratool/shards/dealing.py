"""Which parts of a job a worker does, from their sizes alone: the same on every machine."""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loratool.errors import OptionError

__all__ = ["AUTO", "Share", "dealt", "longest_first", "parse_share"]

AUTO: Final = "auto"
SHARE: Final = re.compile(r"(\d{1,9})/(\d{1,9})")


@dataclass(frozen=True, slots=True)
class Share:
    """One of several equal shares, counted from 1; of none (``auto``) whatever nobody does yet."""

    number: int = 0
    count: int = 0

    @property
    def is_auto(self) -> bool:
        """Whether parts are claimed one by one."""
        return not self.count

    def __str__(self) -> str:
        return AUTO if self.is_auto else f"{self.number}/{self.count}"


def parse_share(text: str) -> Share:
    """Return what ``--shards`` means: ``3/8``, or ``auto``.

    Raises:
        OptionError: It is neither.
    """
    if text == AUTO:
        return Share()
    found = SHARE.fullmatch(text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise OptionError(
            "--shards",
            f"{text!r} is no share",
            hint="--shards 3/8 is the third of eight, --shards auto what nobody does yet",
        )
    return Share(int(found[1]), int(found[2]))


def dealt(sizes: Sequence[int], share: Share) -> list[int]:
    """Return the indices of the parts in a share, the longest first.

    The longest that is left goes to whoever has least (Graham's LPT rule: at most 4/3 of the best).
    """
    loads = [(0, number) for number in range(1, min(share.count, len(sizes)) + 1)]
    found: list[int] = []
    for index in longest_first(sizes):
        load, number = heapq.heappop(loads)
        if number == share.number:
            found.append(index)
        heapq.heappush(loads, (load + max(1, sizes[index]), number))
    return found


def longest_first(sizes: Sequence[int]) -> list[int]:
    """Return the indices of all parts, the longest first, so that none is left for the end."""
    return sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
