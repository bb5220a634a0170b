"""Tensors whose parts lie apart, in several files or archives, and are joined when they are read.

A :class:`Gathered` stands behind a stored tensor (its ``whole``): offset and strides of that are
those inside the whole, as if it were one run of bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from loratool.errors import FileFormatError, unreadable
from loratool.files.container import read_bytes
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import Stamp, stamp_of
from loratool.files.pickles import tensor_in
from loratool.files.sources import opened
from loratool.files.spec import StoredTensor, TensorSpec

__all__ = ["ArchivedTensor", "Gathered", "Piece", "Source", "StoredSource", "cover"]

MOST_OVERLAPS: Final = 512
"""How many pieces are compared each with each."""


class Source(Protocol):
    """Where a piece is."""

    def read(self) -> bytes:
        """Return its elements, row-major.

        Raises:
            FileFormatError: They cannot be read, or are others than they were said to be.
        """
        ...


@dataclass(frozen=True, slots=True)
class ArchivedTensor:
    """A tensor that ``torch.save`` wrote by itself, somewhere in a file.

    Attributes:
        spec: What it is said to be.
        path: The file.
        begin: Where its archive begins.
        length: Bytes of the archive.
        stamp: What the file was when it was first seen.
    """

    spec: TensorSpec
    path: Path
    begin: int
    length: int
    stamp: Stamp

    def read(self) -> bytes:
        """See :class:`Source`."""
        try:
            with opened(self.path) as file:
                if not stamp_of(file).fits(self.stamp):
                    raise FileFormatError(self.path, "was changed while it was read")
                file.seek(self.begin)
                data = file.read(self.length)
        except OSError as error:
            raise unreadable(self.path, error) from None
        found = tensor_in(self.path, io.BytesIO(data), self.spec.name)
        if (found.spec.dtype, found.spec.shape) != (self.spec.dtype, self.spec.shape):
            raise FileFormatError(
                self.path,
                f"holds {found.spec.dtype} {list(found.spec.shape)} where {self.spec.name!r} is "
                f"said to be {self.spec.dtype} {list(self.spec.shape)}",
            )
        return read_bytes(replace(found, offset=self.begin + found.offset))


@dataclass(frozen=True, slots=True)
class StoredSource:
    """A stored tensor as a piece."""

    tensor: StoredTensor

    def read(self) -> bytes:
        """See :class:`Source`."""
        return read_bytes(self.tensor)


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a tensor.

    Attributes:
        first: The index of its first element in the whole.
        shape: Its sides.
        source: Where it is.
    """

    first: tuple[int, ...]
    shape: tuple[int, ...]
    source: Source


@dataclass(frozen=True, slots=True)
class Gathered:
    """A tensor in pieces that cover it.

    Attributes:
        spec: What the whole is.
        pieces: Where its blocks are.
    """

    spec: TensorSpec
    pieces: tuple[Piece, ...]

    def read(self) -> bytes:
        """Return the whole, row-major."""
        if len(self.pieces) == 1:
            return self.pieces[0].source.read()
        import numpy as np

        word = f"V{DTYPES[self.spec.dtype].size(1)}"
        whole = np.zeros(self.spec.shape, dtype=word)
        for piece in self.pieces:
            place = tuple(
                slice(first, first + side)
                for first, side in zip(piece.first, piece.shape, strict=True)
            )
            whole[place] = np.frombuffer(piece.source.read(), word).reshape(piece.shape)
        return whole.tobytes()


def cover(shape: Sequence[int], blocks: Sequence[tuple[Sequence[int], Sequence[int]]]) -> str:
    """Return what is wrong with blocks that are to make up a whole, in words; empty: nothing.

    Args:
        shape: Of the whole.
        blocks: The first index and the sides of each.
    """
    if any(
        len(first) != len(shape)
        or len(sides) != len(shape)
        or any(f < 0 or s < 0 or f + s > n for f, s, n in zip(first, sides, shape, strict=True))
        for first, sides in blocks
    ):
        return "a piece lies outside of it"
    filled = [block for block in blocks if math.prod(block[1])]
    total = sum(math.prod(sides) for _, sides in filled)
    if total < math.prod(shape):
        return f"pieces of {math.prod(shape) - total} of its elements are missing"
    if total > math.prod(shape) or not _are_apart(shape, filled):
        return "two pieces overlap"
    return ""


def _are_apart(shape: Sequence[int], blocks: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    axes = [axis for axis in range(len(shape)) if any(s[axis] != shape[axis] for _, s in blocks)]
    if len(axes) <= 1:
        runs = sorted((first[axis], sides[axis]) for first, sides in blocks for axis in axes)
        ends = [first + side for first, side in runs]
        return len(blocks) < 2 or (
            bool(axes) and all(end <= run[0] for end, run in zip(ends, runs[1:], strict=False))
        )
    if len(blocks) > MOST_OVERLAPS:
        return False
    return not any(
        all(f < g + t and g < f + s for f, s, g, t in zip(*one, *other, strict=True))
        for index, one in enumerate(blocks)
        for other in blocks[:index]
    )
