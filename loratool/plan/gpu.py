"""Stored tensors as torch tensors, whole or by blocks of rows, and blocks computed by torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from loratool.codecs.weights import RowSource
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor
from loratool.math.products import TorchProducts
from loratool.values.arrays import decode

__all__ = [
    "Arithmetic",
    "TorchBench",
    "exact_products",
    "read_tensor",
    "resolve_device",
    "torch_dtype",
]


_tf32_lock = Lock()


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a dtype name of a header (``"BF16"``); float32 for blocks."""
    if DTYPES[name].block:
        return torch.float32
    attribute = DTYPES[name].torch_name
    if attribute is None:
        raise FileFormatError("dtype", f"torch has no {name}")
    dtype = getattr(torch, attribute)
    assert isinstance(dtype, torch.dtype)
    return dtype


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """In what dtype, and on which device, something is computed."""

    dtype: torch.dtype
    device: torch.device

    def read(self, stored: StoredTensor) -> Tensor:
        """Return a whole tensor as numbers."""
        return read_tensor(stored, self)

    def rows(self, reader: RowSource, start: int, count: int) -> Tensor:
        """Return rows of a stored tensor as numbers, ``(count, width)``."""
        values = torch.frombuffer(reader.read(start, count), dtype=torch_dtype(reader.dtype))
        return values.view(count, reader.width).to(self.device, self.dtype, copy=True)

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def rounded(self, values: Tensor, dtype: str) -> Tensor:
        """Return values rounded to ``dtype``, in their own."""
        return values.to(torch_dtype(dtype)).to(values.dtype)

    def converted(self, values: Tensor) -> Tensor:
        """Return values in this dtype."""
        return values.to(self.dtype)

    def double(self) -> Arithmetic:
        """Return the same in float64."""
        return Arithmetic(torch.float64, self.device)


class TorchBench:
    """Memory of one thread, and blocks on a device."""

    def __init__(self, device: torch.device) -> None:
        torch.set_num_threads(1)
        self.products = TorchProducts()
        self.device = device
        self._input = bytearray()
        self._result = torch.empty(0)

    def input(self, size: int) -> memoryview:
        """Return memory to read bytes into."""
        if len(self._input) < size:
            self._input = bytearray(size)
        return memoryview(self._input)

    def load(
        self, data: memoryview, dtype: str, shape: tuple[int, int], *, is_double: bool = False
    ) -> Tensor:
        """Return stored numbers as a block that may be changed."""
        values = torch.frombuffer(data, dtype=torch_dtype(dtype)).view(shape)
        kind = torch.float64 if is_double else torch.float32
        return values.to(self.device, kind, copy=True)

    def take(self, values: Any) -> Tensor:
        """Return new numbers of the processor as a block."""
        return torch.from_numpy(values).to(self.device)

    def given(self, block: Tensor) -> Any:
        """Return a block as an array of the processor."""
        return block.cpu().numpy()

    def kept(self, block: Tensor) -> Tensor:
        """Return a copy."""
        return block.clone()

    def store(self, block: Tensor, dtype: str) -> tuple[memoryview, bool]:
        """Round a block once; return its bytes, and whether all numbers were finite."""
        self._result = block.to(torch_dtype(dtype))
        is_finite = not self._result.is_floating_point() or bool(self._result.isfinite().all())
        flat = self._result.cpu().contiguous().view(-1).view(torch.uint8)
        return flat.numpy().data, is_finite

    def surviving(self, block: Tensor, original: Tensor, dtype: str) -> tuple[float, float]:
        """Return ``⟨W' - W, Δ⟩`` and ``‖Δ‖²`` of the block that was stored last."""
        change = block.sub_(original).flatten()
        kept = self._result.to(original.dtype).sub(original).flatten()
        return float(kept.dot(change)), float(change.dot(change))


@contextmanager
def exact_products() -> Iterator[None]:
    """Have GPUs multiply float32 in float32, whatever the environment says; then as before.

    ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1``, which some containers set, lets them drop 13 of the
    23 bits of a number otherwise.
    """
    settings = torch.backends.cuda.matmul
    with _tf32_lock:
        before = settings.allow_tf32
        settings.allow_tf32 = False
    try:
        yield
    finally:
        with _tf32_lock:
            settings.allow_tf32 = before


def resolve_device(name: str) -> torch.device:
    """Return the device that ``--device`` means.

    ``auto`` is the processor: what a merge does with a weight takes less time than the way to
    a GPU and back.

    Raises:
        UnsupportedError: There is no such device.
    """
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
        # Its library of decompositions must not be loaded by two threads at once.
        torch.linalg.inv(torch.ones((1, 1), device=device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedError(f"--device {name}", f"not to be had here: {reason}") from None
    return device


def read_tensor(stored: StoredTensor, kind: Arithmetic | None = None) -> Tensor:
    """Read a whole tensor: a contiguous copy, as it is stored or ready for ``kind``."""
    dtype = torch_dtype(stored.spec.dtype)
    if stored.spec.elements == 0:
        values = torch.empty(stored.spec.shape, dtype=dtype)
    elif DTYPES[stored.spec.dtype].block:
        values = torch.from_numpy(decode(stored)).to(dtype)
    else:
        values = torch.frombuffer(bytearray(read_bytes(stored)), dtype=dtype)
        values = values.reshape(stored.spec.shape)
    return values if kind is None else values.to(kind.device, kind.dtype)
