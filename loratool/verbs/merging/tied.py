"""Parameters that share one weight: kept tied, or written apart.

With tied weights an adapter on one of them changes only that one, and the merged model has
different weights where the base had one. It stays tied where the adapter changes all alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.adapter.model import Kind
from loratool.adapter.slots import Slot
from loratool.base.model import Model
from loratool.base.ties import Tie, have_same_values
from loratool.errors import MergeError
from loratool.files.container import read_bytes
from loratool.files.spec import StoredTensor
from loratool.names.tied import EMBEDDING_LEAVES, HEAD_LEAVES
from loratool.plan.model import AddDelta, SetRows
from loratool.verbs.merging.context import Changes, Share

__all__ = ["Untied", "row_notes", "settle_ties", "unknown_ties"]

HEADS: Final = frozenset((*HEAD_LEAVES, "decoder"))


@dataclass(frozen=True, slots=True)
class Untied:
    """What a merge writes apart that was one weight.

    Attributes:
        names: Parameters that the base does not store, and the tensor that they start from.
        in_config: Whether ``config.json`` has to say so.
    """

    names: Mapping[str, str]
    in_config: bool

    @property
    def notes(self) -> list[str]:
        """What a user should know."""
        added = f"; added: {', '.join(map(repr, self.names))}" if self.names else ""
        notes = [f"weights are no longer tied{added}"]
        if not self.in_config:
            notes.append(
                "the tie in config.json keeps its value, which means more in this family: "
                "transformers 5 keeps apart what differs in the files, earlier versions do not"
            )
        return notes


def settle_ties(shares: Sequence[Share], base: Model) -> Untied | None:
    """Decide which parameters stay tied, and complete the changes accordingly.

    Where the configuration says that nothing is tied any more, all of them are written, also
    those that are still alike.

    Returns:
        What is written apart, if anything; every share holds the changes of these.
    """
    ties = base.ties
    uneven = {n for n, tie in enumerate(ties) for s in shares if not _are_alike(s, tie)}
    if not uneven:
        for tie in ties:
            for share in shares:
                _join(share, tie, tie.stored)
        return None
    for number, tie in enumerate(ties):
        for share in shares:
            if number in uneven and not _are_alike(share, tie):
                _part(share, tie, base)
            else:
                _join(share, tie, tie.names)
    if base.config.can_untie:
        return Untied(base.hidden, in_config=True)
    # Its loader ties to the first what it does not find, and keeps apart what differs from it.
    names = {}
    for tie in ties:
        first = tie.names[0]
        for name in tie.names:
            if name in base.tensors:
                continue
            can_follow = first in base.tensors and all(
                _is_same(share.changes[first], share.changes[name]) for share in shares
            )
            if can_follow:
                for share in shares:
                    del share.changes[name]
            else:
                names[name] = tie.source
    return Untied(names, in_config=False)


def unknown_ties(shares: Sequence[Share], base: Model) -> list[str]:
    """Return a note where a table changes that a loader may tie to a head that is not known.

    Such are models with a decoder of any class in them, and classes that no table lists.
    """
    if base.ties or not base.config or base.config.is_untied:
        return []
    tables = [name for name in base.tensors if any(_is_table(name, share) for share in shares)]
    shapes = {base.shape(name) for name in tables}
    heads = [
        name
        for name in base.tensors
        if name not in tables and base.shape(name) in shapes and name.split(".")[-2] in HEADS
    ]
    if not tables or heads:
        return []
    return [
        f"{tables[0]!r} changes, and the base stores no output head: if its loader ties one to "
        "this table, that changes too"
    ]


def _is_table(name: str, share: Share) -> bool:
    changes = share.changes.get(name)
    if not changes or len(name.split(".")) < 2:
        return False
    sites = [edit.site for edit in changes.edits if isinstance(edit, AddDelta)]
    is_known = name.split(".")[-2] in EMBEDDING_LEAVES and name.endswith(".weight")
    return is_known or any(site.kind is Kind.EMBEDDING for site in sites)


def row_notes(shares: Sequence[Share], base: Model, untied: Untied | None) -> list[str]:
    """Return a note for each head with a bias that gets trained rows.

    PEFT leaves the bias out of what it computes, as long as it has not merged the rows.
    """
    notes = []
    for tie in base.ties:
        if tie.head is None:
            continue
        bias = f"{tie.head.removesuffix('weight')}bias"
        rows = tie.head if untied else tie.source
        found = any(_sets_rows(share.changes[rows]) for share in shares if rows in share.changes)
        if found and (bias in base.tensors or bias in base.hidden):
            notes.append(
                f"{bias!r} stays as it is; PEFT computes without it as long as it has not merged "
                "the trained tokens"
            )
    return notes


def _join(share: Share, tie: Tie, names: Sequence[str]) -> None:
    """Give ``names`` the changes that all parameters of a tie have."""
    changes = [found for name in tie.names if (found := share.changes.pop(name, None))]
    if not changes:
        return
    _check_copies(share, tie, changes)
    common = changes[0]
    common.base = next((each.base for each in changes if each.base), None)
    share.changes |= dict.fromkeys(names, common)


def _check_copies(share: Share, tie: Tie, changes: Sequence[Changes]) -> None:
    """Make sure that an adapter's copies of a tied weight are one.

    Raises:
        MergeError: They differ.
    """
    copies = [each.base for each in changes if each.base]
    copies += [copy.tensor for each in changes for copy in each.copies]
    for other in copies[1:]:
        if not have_same_values(copies[0], other):
            raise MergeError(
                share.where(other.spec.name),
                f"holds other values than {copies[0].spec.name!r}, and the base has one weight for "
                f"both ({tie.source!r})",
                hint="if both were trained, name their modules in modules_to_save",
            )


def _part(share: Share, tie: Tie, model: Model) -> None:
    """Complete the changes of parameters that do not change alike."""
    changes = {name: share.changes[name] for name in tie.names}
    # All start from one weight: what is stored of it for one is meant for the others too.
    base = next((each.base for each in changes.values() if each.base), None)
    copies = next((each.copies for each in changes.values() if each.copies), [])
    stored = model.tensors[tie.source]
    copies = [copy for copy in copies if not have_same_values(copy.tensor, stored)]
    for each in changes.values():
        each.base = each.base or base
        if each.replacement is None and not each.copies:
            each.edits[:0] = copies
    if tie.input is None or not changes[tie.input].is_rows_only:
        return
    rows = changes.pop(tie.input)
    if not any(_sets_rows(each) for each in changes.values()):
        for each in changes.values():
            each.edits[:0] = rows.effects


def _sets_rows(changes: Changes) -> bool:
    return any(isinstance(edit, SetRows) for edit in changes.edits)


def _are_alike(share: Share, tie: Tie) -> bool:
    """Whether a share changes all parameters of a tie in the same way (or none)."""
    changes = {name: share.changes.get(name) or Changes() for name in tie.names}
    first = changes.pop(tie.input or tie.source)
    others = changes.values()
    are_followed = tie.input is not None and first.is_rows_only
    if are_followed and not any(other.effects or other.replacement for other in others):
        return True
    return all(_is_same(first, other) for other in others)


def _is_same(first: Changes, second: Changes) -> bool:
    """Whether two parameters of one weight have the same values afterwards."""
    if first is second:
        return True
    if first.replacement is not None and second.replacement is not None:
        same = have_same_values(first.replacement, second.replacement)
        return same and not first.effects and not second.effects
    if first.replacement is not None or second.replacement is not None:
        return False
    if first.is_rows_only and second.is_rows_only:
        return _same_rows(first, second)
    return _same_delta(first, second)


def _same_rows(embedding: Changes, head: Changes) -> bool:
    pairs = zip(embedding.effects, head.effects, strict=False)
    return len(embedding.effects) == len(head.effects) and all(
        isinstance(one, SetRows)
        and isinstance(two, SetRows)
        and one.indices == two.indices
        and have_same_values(one.tensor, two.tensor)
        for one, two in pairs
    )


def _same_delta(first: Changes, second: Changes) -> bool:
    """Whether two deltas are one: as they are, or swapped and transposed for the other side."""
    edits = [edit for edit in (*first.effects, *second.effects) if isinstance(edit, AddDelta)]
    if [len(first.effects), len(second.effects), len(edits)] != [1, 1, 2]:
        return False
    if edits[0].scale != edits[1].scale:
        return False
    one, two = (edit.site for edit in edits)
    is_turned = (Slot.EMBEDDING_DOWN in one.slots) != (Slot.EMBEDDING_DOWN in two.slots)
    other = (two.down, two.up) if is_turned else (two.up, two.down)
    compare = _is_transpose if is_turned else have_same_values
    return all(
        a is not None and b is not None and compare(a, b)
        for a, b in zip((one.up, one.down), other, strict=True)
    )


def _is_transpose(first: StoredTensor, second: StoredTensor) -> bool:
    if first.spec.shape != second.spec.shape[::-1] or first.spec.dtype != second.spec.dtype:
        return False
    import numpy as np

    width = first.spec.nbytes // max(1, first.spec.elements)
    kind = np.dtype(f"V{width}")
    values = np.frombuffer(read_bytes(first), kind).reshape(first.spec.shape)
    return bool(values.T.tobytes() == read_bytes(second))
