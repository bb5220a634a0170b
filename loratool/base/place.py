"""Where the weight of one module lies: in which tensors, which rows of them, which way round."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.base.joined import ordered
from loratool.base.region import Region
from loratool.base.ties import Tie
from loratool.codecs.codec import CodedTensor
from loratool.codecs.weights import Weight
from loratool.files.spec import StoredTensor

__all__ = ["Piece", "Place", "bias_beside"]


def bias_beside(weight: str) -> str:
    """Return what the bias beside a weight is called, in the layer that has both."""
    return weight.removesuffix("weight") + "bias"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a module's weight that lies in one tensor.

    Attributes:
        name: The tensor as a checkpoint names it. One that a tied model does not store is
            named all the same.
        tensor: What holds its values.
        region: Where in the tensor, seen as a matrix, it lies.
        first: Which of the module's outputs the first row of it is.
    """

    name: str
    tensor: Weight
    region: Region
    first: int = 0

    @property
    def outputs(self) -> int:
        """How many outputs of the module it has."""
        return self.region.columns if self.region.transposed else self.region.rows

    @property
    def bias(self) -> str:
        """What the bias beside that tensor is called, if there is one."""
        return bias_beside(self.name)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its tensor, and no stack."""
        region, elements = self.region, self.tensor.spec.elements
        is_all = region.experts == 1 and region.rows * region.columns == elements
        return is_all and region.exchanged is None

    @property
    def ordered(self) -> Weight | None:
        """All of its tensor with the rows in their order; ``None`` where it is not all of it."""
        region = self.region
        exchanged = region.exchanged
        is_all = region.rows * region.columns == self.tensor.spec.elements
        if exchanged is None or not is_all or region.transposed or region.experts > 1:
            return None
        return ordered(self.tensor, exchanged)

    @property
    def view(self) -> StoredTensor | None:
        """The stored tensor that is just this part; ``None`` where that is no run of rows."""
        region, tensor = self.region, self.tensor
        is_mixed = region.columns != region.width or region.exchanged is not None
        if not isinstance(tensor, StoredTensor) or is_mixed:
            return None
        if self.is_whole:
            return tensor
        if region.experts > 1:
            return None
        return tensor.rows(region.first_row, region.rows, region.width)


@dataclass(frozen=True, slots=True)
class Place:
    """The weight of one module, whichever way the model is cut.

    Attributes:
        module: What the model calls it.
        shape: ``(out, in)``, or ``(out, in, *kernel)``: as a delta is seen, however it is stored.
            For an embedding these are its dimension and its tokens.
        dtype: The dtype of its values.
        pieces: Where it lies: one piece, but for what the model has in several tensors.
        experts: How many such weights lie behind each other, for a stack of experts.
        tie: The tie that it is a side of, if it is.
    """

    module: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]
    experts: int = 1
    tie: Tie | None = None

    def start(self, piece: Piece) -> int:
        """Return which row a piece begins with, of all such weights one below the other."""
        region = piece.region
        if region.expert is None:
            return piece.first
        index, parts = region.part
        return region.expert * self.shape[0] + index * (self.shape[0] // parts)

    @property
    def is_transposed(self) -> bool:
        """Whether it is stored as ``(in, out)``."""
        return self.pieces[0].region.transposed

    @property
    def is_whole(self) -> bool:
        """Whether it is one tensor, with nothing else in it."""
        return len(self.pieces) == 1 and self.pieces[0].is_whole

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The tensors of the files that its values are made of."""
        weights = (piece.tensor for piece in self.pieces)
        parts = (w.parts.values() if isinstance(w, CodedTensor) else (w,) for w in weights)
        return tuple(tensor for part in parts for tensor in part)

    @property
    def codec(self) -> str | None:
        """What its codes are called; ``None`` for plain numbers."""
        tensor = self.pieces[0].tensor
        return tensor.codec.name if isinstance(tensor, CodedTensor) else None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of its own parameter: that of the tensor, where it has one to itself."""
        if self.is_whole:
            return self.pieces[0].tensor.spec.shape
        return self.shape[::-1] if self.is_transposed else self.shape
