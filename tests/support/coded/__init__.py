"""Coded weights in memory, one file of samples for each codec, named like it.

Each such file has a ``samples()`` that yields :class:`Sample`; the contract suite runs them all.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import iter_modules

import numpy as np

from loratool.codecs.codec import CodedTensor, Description, recognise
from loratool.codecs.numbers import encode
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor, TensorSpec

MODULE = "model.layers.0.mlp.up_proj"
Tensor = tuple[str, tuple[int, ...], bytes]
"""Dtype, shape and bytes."""


@dataclass(frozen=True)
class Sample:
    """One coded weight in memory.

    Attributes:
        codec: The file of its codec.
        label: What tells it from other samples of the codec.
        tensors: Dtype, shape and bytes by name; besides those of the weight there may be others.
        said: What the model says of itself.
        truth: The numbers that it stands for, by the formula, in float64, in the logical shape.
        module: What the codec knows it by.
        name: What the weight is called.
        dtype: The float that it stands for.
        scales: Names of the tensors of floats in which a NaN has to be refused.
        optional: Names of the tensors without which it is still whole.
    """

    codec: str
    label: str
    tensors: dict[str, Tensor]
    said: Description
    truth: np.ndarray
    module: str = MODULE
    name: str = f"{MODULE}.weight"
    dtype: str = "BF16"
    scales: tuple[str, ...] = ()
    optional: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return f"{self.codec}-{self.label}"

    def stored(self, folder: Path | None = None) -> dict[str, StoredTensor]:
        """Return the tensors; in a folder, with their bytes in a file of their own each."""
        found = {}
        for number, (name, (dtype, shape, data)) in enumerate(self.tensors.items()):
            path = Path("memory")
            if folder is not None:
                path = folder / str(number)
                path.write_bytes(data)
            found[name] = StoredTensor(TensorSpec(name, dtype, shape), path, 0)
        return found

    def coded(self, folder: Path) -> CodedTensor:
        """Return the weight as it is recognised, its bytes in files of ``folder``."""
        found = recognise(self.stored(folder), self.said)
        assert list(found) == [self.module]
        return found[self.module]

    def without(self, name: str) -> Sample:
        """Return it with one tensor missing."""
        return replace(self, tensors={k: v for k, v in self.tensors.items() if k != name})

    def with_nan(self, name: str) -> Sample:
        """Return it with a NaN as the first number of one tensor."""
        dtype, shape, data = self.tensors[name]
        nan = b"\xff" if dtype in ("U8", "F8_E8M0") else encode(np.array([np.nan]), dtype).tobytes()
        return replace(self, tensors={**self.tensors, name: (dtype, shape, nan + data[len(nan) :])})

    def parts(self) -> MemoryParts:
        """Return what reads its tensors."""
        return MemoryParts({name: data for name, (_, _, data) in self.tensors.items()})


@dataclass
class MemoryParts:
    """Reads tensors whose bytes are in memory."""

    data: Mapping[str, bytes]

    def rows(self, part: StoredTensor, start: int, stop: int) -> memoryview:
        rows = part.spec.shape[0] if part.spec.shape else 1
        assert 0 <= start <= stop <= rows, (part.spec, start, stop)
        data = self.data[part.spec.name]
        size = len(data) // rows
        return memoryview(data)[start * size : stop * size]

    def columns(
        self, part: StoredTensor, start: int, stop: int, rows: tuple[int, int] | None = None
    ) -> memoryview:
        first, last = rows or (0, part.spec.shape[0])
        size = DTYPES[part.spec.dtype].size
        whole = np.frombuffer(self.rows(part, first, last), np.uint8).reshape(last - first, -1)
        cut = whole[:, size(start) : size(stop)]
        assert cut.shape[1] == size(stop - start)
        return np.ascontiguousarray(cut).reshape(-1).data


def tensor(values: np.ndarray, dtype: str) -> tuple[Tensor, np.ndarray]:
    """Return numbers rounded to a float as a tensor, and as what they became, in float64."""
    from loratool.codecs.numbers import decode

    codes = encode(np.asarray(values, dtype=np.float64), dtype)
    data = codes.tobytes()
    return (dtype, codes.shape, data), decode(data, dtype, codes.shape)


def all_samples() -> Iterator[Sample]:
    """Yield the samples of all codecs."""
    for info in iter_modules(__path__):
        yield from importlib.import_module(f"{__name__}.{info.name}").samples()
