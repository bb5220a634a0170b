"""Input embedding and output head that share one weight: kept tied, or written apart.

With tied weights an adapter on one of the two changes only that one, and the merged model has
two different weights where the base had one. It stays tied where the adapter changes both alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from loratool.adapter.slots import Slot
from loratool.errors import UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.spec import StoredTensor
from loratool.names.tied import EMBEDDING_LEAVES, head_name, tie_flag
from loratool.ops.merging.context import BaseView, Changes, Share
from loratool.ops.plan import AddDelta

__all__ = ["Tie", "find_tie", "settle_tie"]


@dataclass(frozen=True, slots=True)
class Tie:
    """The shared weight of a base.

    Attributes:
        embedding: Name of the input embedding's tensor.
        head: Name of the output head's tensor, which the base may store or not.
        is_stored: Whether the base stores the head as well.
    """

    embedding: str
    head: str
    is_stored: bool


def find_tie(base: BaseView) -> Tie | None:
    """Return the shared weight of ``base``, or ``None`` where nothing is tied."""
    name = head_name(base.config)
    flag = tie_flag(base.config)
    if name is None or flag is False:
        return None
    embeddings = [
        tensor
        for tensor, stored in base.tensors.items()
        if len(stored.spec.shape) == 2
        and tensor.endswith(".weight")
        and tensor.split(".")[-2] in EMBEDDING_LEAVES
    ]
    if len(embeddings) != 1:
        return None
    embedding = embeddings[0]
    owner = base.index.find(name, parameter="weight")
    if owner is None:
        return Tie(embedding, _head_beside(embedding, name), is_stored=False)
    head = f"{owner}.weight"
    if base.shape(head) != base.shape(embedding):
        return None
    if flag is None and not _same_values(base.tensors[head], base.tensors[embedding]):
        return None
    return Tie(embedding, head, is_stored=True)


def _head_beside(embedding: str, name: str) -> str:
    """Name the head as a checkpoint would that names its embedding ``embedding``."""
    outer = embedding.partition(".model.")[0]
    prefix = f"{outer}." if outer != embedding and outer == "language_model" else ""
    return f"{prefix}{name}.weight"


def _same_values(first: StoredTensor, second: StoredTensor) -> bool:
    return first.spec.dtype == second.spec.dtype and read_bytes(first) == read_bytes(second)


def settle_tie(tie: Tie, shares: list[Share], base: BaseView) -> bool:
    """Decide whether the merged model stays tied, and complete the changes accordingly.

    Returns:
        Whether it stays tied. Where it does not, every share holds the changes of both tensors.

    Raises:
        UnsupportedError: The model cannot be untied by its files alone.
    """
    alike = {id(share): _is_alike(share, tie) for share in shares}
    if all(alike.values()):
        for share in shares:
            changes = share.changes.pop(tie.head, None) or share.changes.get(tie.embedding)
            if changes:
                share.changes.setdefault(tie.embedding, changes)
                if tie.is_stored:
                    share.changes[tie.head] = share.changes[tie.embedding]
        return True
    if base.config.get("is_encoder_decoder"):
        raise UnsupportedError(
            tie.head,
            "the adapter changes one of two tied weights of an encoder-decoder model, whose "
            "code depends on the tie",
            hint="merge with --skip for the embedding or the head",
        )
    for share in shares:
        if alike[id(share)] and share.changes.get(tie.embedding):
            share.changes[tie.head] = share.changes[tie.embedding]
    return False


def _is_alike(share: Share, tie: Tie) -> bool:
    """Whether a share changes embedding and head in the same way (or neither)."""
    embedding = share.changes.get(tie.embedding) or Changes()
    head = share.changes.get(tie.head) or Changes()
    if not embedding and not head:
        return True
    if not head:
        return tie.embedding in share.rows_only
    if not embedding:
        return False
    if embedding.replacement is not None and head.replacement is not None:
        same = _same_values(embedding.replacement, head.replacement)
        return same and not embedding.edits and not head.edits
    return _same_delta(embedding, head)


def _same_delta(embedding: Changes, head: Changes) -> bool:
    """Whether the head's factors are those of the embedding, swapped and transposed."""
    first = [edit for edit in embedding.edits if isinstance(edit, AddDelta)]
    second = [edit for edit in head.edits if isinstance(edit, AddDelta)]
    if len(first) != 1 or len(second) != 1:
        return False
    one, two = first[0].site, second[0].site
    if one.scaling.factor != two.scaling.factor or Slot.EMBEDDING_DOWN not in one.slots:
        return False
    pairs = ((one.up, two.down), (one.down, two.up))
    return all(a is not None and b is not None and _is_transpose(a, b) for a, b in pairs)


def _is_transpose(first: StoredTensor, second: StoredTensor) -> bool:
    if first.spec.shape != second.spec.shape[::-1] or first.spec.dtype != second.spec.dtype:
        return False
    import numpy as np

    width = first.spec.nbytes // max(1, first.spec.elements)
    kind = np.dtype(f"V{width}")
    values = np.frombuffer(read_bytes(first), kind).reshape(first.spec.shape)
    return bool(values.T.tobytes() == read_bytes(second))
