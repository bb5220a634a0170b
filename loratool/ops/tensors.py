"""Read stored tensors as torch tensors, whole or by blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from loratool.errors import FileFormatError
from loratool.files.container import read_bytes
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor
from loratool.files.transfer import read_into

__all__ = ["RowReader", "read_tensor", "torch_dtype"]


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a dtype name of a header (``"BF16"``)."""
    attribute = DTYPES[name].torch_name
    if attribute is None:
        raise FileFormatError("dtype", f"torch has no {name}")
    dtype = getattr(torch, attribute)
    assert isinstance(dtype, torch.dtype)
    return dtype


def read_tensor(stored: StoredTensor, dtype: torch.dtype | None = None) -> Tensor:
    """Read a whole tensor; a copy, contiguous, in its own dtype or in ``dtype``."""
    kind = torch_dtype(stored.spec.dtype)
    if stored.spec.elements == 0:
        return torch.empty(stored.spec.shape, dtype=dtype or kind)
    values = torch.frombuffer(bytearray(read_bytes(stored)), dtype=kind).reshape(stored.spec.shape)
    return values if dtype is None else values.to(dtype)


class RowReader:
    """A stored tensor seen as a matrix of ``width`` columns, read by blocks of rows.

    Args:
        stored: The tensor.
        width: Number of columns; its elements are a multiple of it.
        files: Where the descriptor comes from.
    """

    def __init__(self, stored: StoredTensor, width: int, files: InputFiles) -> None:
        self.stored = stored
        self.width = width
        self.dtype = torch_dtype(stored.spec.dtype)
        self._whole = read_bytes(stored) if stored.strides is not None else None
        self._descriptor = files.descriptor(stored.path)

    def read(self, start: int, rows: int, buffer: memoryview) -> Tensor:
        """Return rows ``start`` to ``start + rows``, ``(rows, width)``, backed by ``buffer``."""
        count = rows * self.width
        size = count * self.dtype.itemsize
        view = buffer[:size]
        offset = start * self.width * self.dtype.itemsize
        if self._whole is not None:
            view[:] = self._whole[offset : offset + size]
        else:
            read_into(self._descriptor, view, self.stored.offset + offset, path=self.stored.path)
        return torch.frombuffer(view, dtype=self.dtype, count=count).view(rows, self.width)

    def rows(self, start: int, rows: int) -> Tensor:
        """Return the same in a buffer of its own."""
        buffer = memoryview(bytearray(rows * self.width * self.dtype.itemsize))
        return self.read(start, rows, buffer)
