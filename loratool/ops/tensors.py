"""Read stored tensors as torch tensors, whole or by blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor
from loratool.files.transfer import read_into

__all__ = ["Arithmetic", "RowReader", "read_tensor", "resolve_device", "torch_dtype"]


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a dtype name of a header (``"BF16"``)."""
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
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedError(f"--device {name}", f"not to be had here: {reason}") from None
    return device


def read_tensor(stored: StoredTensor, kind: Arithmetic | None = None) -> Tensor:
    """Read a whole tensor: a contiguous copy, as it is stored or ready for ``kind``."""
    dtype = torch_dtype(stored.spec.dtype)
    if stored.spec.elements == 0:
        values = torch.empty(stored.spec.shape, dtype=dtype)
    else:
        values = torch.frombuffer(bytearray(read_bytes(stored)), dtype=dtype)
        values = values.reshape(stored.spec.shape)
    return values if kind is None else values.to(kind.device, kind.dtype)


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
