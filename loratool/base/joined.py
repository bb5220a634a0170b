"""A weight whose rows lie in several places, or in another order, as one: read in their order.

It is in no file as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratool.codecs.codec import CodedTensor, Description, Encoder, Parts
from loratool.codecs.weights import Weight
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["is_joined", "joined", "ordered"]


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


class _Ordered:
    """Codec of a coded weight of whose rows, seen as ``(n, a, b)``, the last two axes are changed.

    Its parts are those of the weight as it lies there.
    """

    name: Final = "rows in another order"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """Recognise nothing: what is in another order is told by its place."""
        return {}

    def decode_rows(
        self,
        coded: CodedTensor,
        start: int,
        stop: int,
        parts: Parts,
        kind: DTypeLike = "float64",
    ) -> NDArray[Any]:
        """Return rows ``start`` to ``stop``, of which each ``a · b`` lie together."""
        weight: CodedTensor = coded.settings["weight"]
        _, outer, inner = coded.settings["axes"]
        size = outer * inner
        first, last = start // size, -(-stop // size)
        found = weight.codec.decode_rows(weight, first * size, last * size, parts, kind)
        seen = found.reshape(last - first, inner, outer, -1).swapaxes(1, 2)
        rows: NDArray[Any] = seen.reshape(found.shape)[start - first * size :][: stop - start]
        return rows

    def encoder(self, coded: CodedTensor) -> Encoder:
        """Refuse: nothing is written this way."""
        raise NotImplementedError


JOINED: Final = _Joined()
ORDERED: Final = _Ordered()


def joined(name: str, shape: tuple[int, ...], parts: Sequence[StoredTensor]) -> CodedTensor | None:
    """Return the weight that ``parts`` are, one below the other; ``None`` where it has no dtype.

    Args:
        name: What it is called.
        shape: Its shape; the first side is the sum of theirs.
        parts: Stored tensors of at most 32 bits, without strides.
    """
    dtypes = {part.spec.dtype for part in parts}
    if len(dtypes) != 1 or "F64" in dtypes or not all(part.is_run for part in parts):
        return None
    spec = TensorSpec(name, dtypes.pop(), shape)
    return CodedTensor(JOINED, {str(n): part for n, part in enumerate(parts)}, spec)


def is_joined(weight: Weight | None) -> bool:
    """Whether a weight is in no file as it is, for its rows lie elsewhere or otherwise."""
    return isinstance(weight, CodedTensor) and weight.codec in (JOINED, ORDERED)


def ordered(weight: Weight, axes: tuple[int, int, int]) -> Weight | None:
    """Return a weight with its rows in their order; ``None`` where that is not known.

    Args:
        weight: As it lies there.
        axes: ``(n, a, b)`` where the rows, seen so, lie with the last two axes exchanged.
    """
    count, outer, inner = axes
    if isinstance(weight, StoredTensor):
        return weight.exchanging((count, inner, outer))
    if len(weight.spec.shape) != 2 or weight.rows != count * outer * inner:
        return None
    return CodedTensor(ORDERED, weight.parts, weight.spec, {"weight": weight, "axes": axes})
