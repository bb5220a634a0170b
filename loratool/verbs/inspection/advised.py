"""What people see of an advice on ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from loratool.display.document import Block, Column, Lines, Row, Table
from loratool.display.figures import human_bytes, human_count

if TYPE_CHECKING:
    from loratool.verbs.advice import Advice, EnoughRanks, Saving

__all__ = ["advice_blocks"]

SHARES: Final = ("90 %", "99 %", "99.9 %")
MOST_KINDS: Final = 100
"""All of them are in the JSON."""
ADVISED: Final = 0.99
"""The share whose command line is given in full."""


def advice_blocks(advice: Advice) -> Iterator[Block]:
    """Yield which ranks keep how much, and what ``truncate`` would save."""
    title = "ranks that keep so much of ‖delta‖²"
    if len(advice.kinds) > MOST_KINDS:
        title += f", the first {MOST_KINDS} of {human_count(len(advice.kinds))} kinds"
    yield Table.of(
        title,
        (
            Column("kind", folds=True, is_kept=True),
            Column("modules", is_kept=True),
            Column("now", is_kept=True),
            *(Column(share, is_kept=True) for share in SHARES),
        ),
        [*map(_kind, advice.kinds[:MOST_KINDS]), _kind(advice.whole)],
    )
    if advice.refusal is not None:
        yield Lines((f"truncate does not take it: {advice.refusal}",))
        return
    yield Table.of(
        "what truncate would save",
        (
            Column("option", is_kept=True),
            Column("size", is_kept=True),
            Column("saves", is_kept=True),
            Column("relative error", is_kept=True),
        ),
        [_saving(saving) for saving in advice.savings],
    )
    yield from (
        Lines((saving.command,))
        for saving in advice.savings
        if saving.options.get("energy") == ADVISED
    )


def _kind(found: EnoughRanks) -> Row:
    ranks = (str(rank) for rank in found.ranks.values())
    return (found.kind or "all", found.modules, found.rank, *ranks)


def _saving(saving: Saving) -> Row:
    ((name, value),) = saving.options.items()
    is_smaller = saving.saved > 0
    return (
        f"--{name} {value:g}",
        human_bytes(saving.bytes),
        human_bytes(saving.saved) if is_smaller else "nothing",
        f"{saving.relative_error:.3g}",
    )
