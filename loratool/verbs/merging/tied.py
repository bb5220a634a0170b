"""Input embedding and output head that share one weight: kept tied, or written apart.

With tied weights an adapter on one of the two changes only that one, and the merged model has
two different weights where the base had one. It stays tied where the adapter changes both alike.
"""

from __future__ import annotations

from loratool.adapter.slots import Slot
from loratool.base.model import Model
from loratool.base.ties import Tie, have_same_values
from loratool.errors import UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.spec import StoredTensor
from loratool.plan.model import AddDelta, SetRows
from loratool.verbs.merging.context import Changes, Share

__all__ = ["settle_tie"]


def settle_tie(tie: Tie, shares: list[Share], base: Model) -> bool:
    """Decide whether the merged model stays tied, and complete the changes accordingly.

    Returns:
        Whether it stays tied. Where it does not, every share holds the changes of both tensors.

    Raises:
        UnsupportedError: The model cannot be untied by its files alone.
    """
    alike = {id(share): _is_alike(share, tie) for share in shares}
    if all(alike.values()):
        for share in shares:
            _keep_tied(share, tie)
        return True
    _check_can_untie(tie, base)
    for share in shares:
        embedding, head = share.changes[tie.embedding], share.changes[tie.head]
        if alike[id(share)]:
            share.changes[tie.head] = embedding
            continue
        # Both start from one weight: what is stored of it for one is meant for the other too.
        embedding.base, head.base = embedding.base or head.base, head.base or embedding.base
        if embedding.is_rows_only and not any(isinstance(e, SetRows) for e in head.edits):
            head.edits[:0] = embedding.effects
    return False


def _keep_tied(share: Share, tie: Tie) -> None:
    head = share.changes.pop(tie.head, None)
    embedding = share.changes[tie.embedding]
    if head and not embedding:
        share.changes[tie.embedding] = embedding = head
    elif head:
        embedding.base = embedding.base or head.base
    if tie.is_stored:
        share.changes[tie.head] = embedding


def _check_can_untie(tie: Tie, base: Model) -> None:
    if tie.is_stored and not base.config.is_encoder_decoder:
        return
    names = base.config.architectures
    if base.config.is_encoder_decoder:
        words = "an encoder-decoder model, whose other embeddings hang on the same tie"
    elif any(name.endswith("ForMaskedLM") for name in names):
        words = "a masked language model, whose head has more parts that hang on the tie"
    else:
        return
    raise UnsupportedError(
        tie.head,
        f"the adapter changes only one of two tied weights ({tie.embedding!r} is the other) of "
        + words,
        hint="merge with --skip for one of them, if the model is not used with its head",
    )


def _is_alike(share: Share, tie: Tie) -> bool:
    """Whether a share changes embedding and head in the same way (or neither)."""
    embedding = share.changes.get(tie.embedding) or Changes()
    head = share.changes.get(tie.head) or Changes()
    if embedding.replacement is not None and head.replacement is not None:
        same = have_same_values(embedding.replacement, head.replacement)
        return same and not embedding.effects and not head.effects
    if embedding.is_rows_only and head.is_rows_only:
        return not head.effects or _same_rows(embedding, head)
    if embedding.replacement is not None or head.replacement is not None:
        return False
    return _same_delta(embedding, head)


def _same_rows(embedding: Changes, head: Changes) -> bool:
    pairs = zip(embedding.effects, head.effects, strict=False)
    return len(embedding.effects) == len(head.effects) and all(
        isinstance(one, SetRows)
        and isinstance(two, SetRows)
        and one.indices == two.indices
        and have_same_values(one.tensor, two.tensor)
        for one, two in pairs
    )


def _same_delta(embedding: Changes, head: Changes) -> bool:
    """Whether the head's factors are those of the embedding, swapped and transposed."""
    first = [edit for edit in embedding.edits if isinstance(edit, AddDelta)]
    second = [edit for edit in head.edits if isinstance(edit, AddDelta)]
    if len(first) != 1 or len(second) != 1:
        return False
    one, two = first[0].site, second[0].site
    if first[0].scale != second[0].scale or Slot.EMBEDDING_DOWN not in one.slots:
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
