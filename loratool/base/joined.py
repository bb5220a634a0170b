"""A weight whose rows lie in several places, as one: read in their order, joined in no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratool.codecs.codec import CodedTensor, Description, Encoder, Parts
from loratool.codecs.weights import Weight
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["is_joined", "joined"]


class _Joined:
    """Codec of rows that are plain numbers, those of each part below those of the one before."""

    name: Final = "rows in another order"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """Recognise nothing: what is joined is told by its place."""
        return {}

    def decode_rows(
        self,
        coded: CodedTensor,
        start: int,
        stop: int,
        parts: Parts,
        kind: DTypeLike = "float64",
    ) -> NDArray[Any]:
        """Return rows ``start`` to ``stop``, from wherever they are."""
        import numpy as np

        from loratool.codecs import numbers

        found, first = [], 0
        for part in coded.parts.values():
            rows = part.spec.shape[0]
            begin, end = max(start - first, 0), min(stop - first, rows)
            if begin < end:
                data = parts.rows(part, begin, end)
                shape = (end - begin, coded.width)
                found.append(numbers.decode(data, part.spec.dtype, shape, kind))
            first += rows
        return np.concatenate(found) if found else np.empty((0, coded.width), kind)

    def encoder(self, coded: CodedTensor) -> Encoder:
        """Refuse: nothing is written this way."""
        raise NotImplementedError


JOINED: Final = _Joined()


def joined(name: str, shape: tuple[int, ...], parts: Sequence[StoredTensor]) -> CodedTensor | None:
    """Return the weight that ``parts`` are, one below the other; ``None`` where it has no dtype.

    Args:
        name: What it is called.
        shape: Its shape; the first side is the sum of theirs.
        parts: Stored tensors of at most 32 bits, without strides.
    """
    dtypes = {part.spec.dtype for part in parts}
    if len(dtypes) != 1 or "F64" in dtypes or any(part.strides for part in parts):
        return None
    spec = TensorSpec(name, dtypes.pop(), shape)
    return CodedTensor(JOINED, {str(n): part for n, part in enumerate(parts)}, spec)


def is_joined(weight: Weight | None) -> bool:
    """Whether a weight is in no file as it is, for its rows lie in several places."""
    return isinstance(weight, CodedTensor) and weight.codec is JOINED
