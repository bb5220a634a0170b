"""Blocks of weights computed by numpy, in memory that is used again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from loratool.codecs import numbers
from loratool.codecs.numbers.scratch import Scratch
from loratool.codecs.weights import RowSource
from loratool.files.container import read_view
from loratool.files.spec import StoredTensor
from loratool.math.products import NumpyProducts

__all__ = ["DOUBLE", "HostArithmetic", "HostBench"]


@dataclass(frozen=True, slots=True)
class HostArithmetic:
    """numpy arrays of one dtype."""

    dtype: str

    def read(self, stored: StoredTensor) -> Any:
        """Return a whole tensor as numbers."""
        spec = stored.spec
        return numbers.decode(read_view(stored), spec.dtype, spec.shape, self.dtype)

    def rows(self, reader: RowSource, start: int, count: int) -> Any:
        """Return rows of a stored tensor as numbers, ``(count, width)``."""
        values = reader.values(start, count, is_double=self.dtype == "float64")
        if values is not None:
            return values
        shape = (count, reader.width)
        return numbers.decode(reader.read(start, count), reader.dtype, shape, self.dtype)

    def zeros(self, *shape: int) -> Any:
        """Return zeros."""
        return np.zeros(shape, dtype=self.dtype)

    def rounded(self, values: Any, dtype: str) -> Any:
        """Return values rounded to ``dtype``, in their own."""
        codes = numbers.encode(values, dtype)
        return numbers.decode(codes, dtype, values.shape, values.dtype)

    def converted(self, values: Any) -> Any:
        """Return values in this dtype."""
        return values.astype(self.dtype, copy=False)

    def double(self) -> HostArithmetic:
        """Return the same in float64."""
        return HostArithmetic("float64")


DOUBLE: Final = HostArithmetic("float64")
"""What factors are computed with on the processor."""


class HostBench:
    """Memory of one thread."""

    def __init__(self) -> None:
        self.products = NumpyProducts()
        self._scratch = Scratch()

    def input(self, size: int) -> memoryview:
        """Return memory to read bytes into."""
        return self._scratch.array("input", (size,), np.uint8).data

    def load(
        self, data: memoryview, dtype: str, shape: tuple[int, int], *, is_double: bool = False
    ) -> Any:
        """Return stored numbers as a block that may be changed until the next call."""
        made = numbers.number(dtype)
        block = self._scratch.array("block", shape, np.float64 if is_double else np.float32)
        made.decode_into(np.frombuffer(data, made.code).reshape(shape), block, self._scratch)
        return block

    def take(self, values: Any) -> Any:
        """Return new numbers as a block: themselves."""
        return values

    def given(self, block: Any) -> Any:
        """Return a block as an array: itself."""
        return block

    def kept(self, block: Any) -> Any:
        """Return a copy that stays until the next call."""
        copy = self._scratch.array("original", block.shape, block.dtype)
        copy[...] = block
        return copy

    def store(self, block: Any, dtype: str) -> tuple[memoryview, bool]:
        """Round a block once; return its bytes, and whether all numbers were finite."""
        made = numbers.number(dtype)
        codes = self._scratch.array("output", block.shape, made.code)
        is_finite = made.encode_into(block, codes, self._scratch)
        return codes.reshape(-1).view(np.uint8).data, is_finite

    def surviving(self, block: Any, original: Any, dtype: str) -> tuple[float, float]:
        """Return ``⟨W' - W, Δ⟩`` and ``‖Δ‖²`` of the block that was stored last."""
        made = numbers.number(dtype)
        codes = self._scratch.array("output", block.shape, made.code)
        kept = self._scratch.array("kept", block.shape, block.dtype)
        made.decode_into(codes, kept, self._scratch)
        block -= original
        kept -= original
        change = block.reshape(-1)
        return float(kept.reshape(-1).dot(change)), float(change.dot(change))
