"""Input embedding and output head that share one weight."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loratool.codecs.weights import Weight
from loratool.files.inputs import InputFiles
from loratool.files.rows import RowBytes
from loratool.files.spec import StoredTensor
from loratool.names.tied import EMBEDDING_LEAVES

if TYPE_CHECKING:
    from loratool.base.model import Model

__all__ = ["Tie", "find_tie", "have_same_values"]

BLOCK_BYTES: Final = 4 << 20


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


def find_tie(base: Model, tasks: Collection[str] = ()) -> Tie | None:
    """Return the shared weight of ``base``, or ``None`` where nothing is tied.

    Args:
        base: The base.
        tasks: The task types of the adapters, which may give it another head.
    """
    name = base.config.head(tasks)
    flag = base.config.is_tied
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
        is_said = flag is True or bool(base.config.architectures)
        head = _head_beside(embedding, name)
        return Tie(embedding, head, is_stored=False) if is_said else None
    head = f"{owner}.weight"
    if head == embedding or base.shape(head) != base.shape(embedding):
        return None
    # Where both are stored and differ, loaders keep them apart whatever the flag says.
    if not have_same_values(base.tensors[head], base.tensors[embedding]):
        return None
    return Tie(embedding, head, is_stored=True)


def _head_beside(embedding: str, name: str) -> str:
    """Name the head as a checkpoint would that names its embedding ``embedding``."""
    outer = embedding.partition(".model.")[0]
    prefix = f"{outer}." if outer != embedding and outer == "language_model" else ""
    return f"{prefix}{name}.weight"


def have_same_values(first: Weight, second: Weight) -> bool:
    """Whether two stored tensors hold the same bytes of the same dtype and shape."""
    if not isinstance(first, StoredTensor) or not isinstance(second, StoredTensor):
        return first == second
    spec = first.spec
    if (spec.shape, spec.dtype) != (second.spec.shape, second.spec.dtype):
        return False
    if not spec.elements:
        return True
    rows = spec.shape[0] if spec.shape else 1
    files = InputFiles({})
    try:
        one, other = (RowBytes(each, spec.elements // rows, files) for each in (first, second))
        step = max(1, BLOCK_BYTES // one.row_bytes)
        counts = ((start, min(step, rows - start)) for start in range(0, rows, step))
        return all(one.read(*block) == other.read(*block) for block in counts)
    finally:
        files.close()
