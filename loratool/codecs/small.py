"""Small tensors that say something about a weight: its shape, or a scale of all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loratool.errors import FileFormatError
from loratool.files.spec import StoredTensor
from loratool.files.transfer import read_into

__all__ = ["beside", "read_small"]

LARGEST: Final = 1 << 16
"""Bytes of a tensor that is called small."""


def read_small(part: StoredTensor) -> bytes:
    """Return the bytes of a small tensor, read at once.

    Raises:
        FileFormatError: It is not small, or its file ended early.
    """
    size = part.spec.nbytes
    if size > LARGEST or part.strides is not None:
        raise FileFormatError(
            part.spec.name, f"has shape {list(part.spec.shape)}, expected a few numbers"
        )
    data = bytearray(size)
    try:
        with part.path.open("rb", buffering=0) as file:
            read_into(file.fileno(), memoryview(data), part.offset, path=part.path)
    except OSError as error:
        raise FileFormatError(part.path, f"cannot be read: {error.strerror}") from None
    return bytes(data)


def beside(
    tensors: Mapping[str, StoredTensor], module: str, leaves: tuple[str, ...]
) -> dict[str, StoredTensor]:
    """Return those of the tensors ``leaves`` that a module has, by these."""
    found = ((leaf, tensors.get(f"{module}.{leaf}")) for leaf in leaves)
    return {leaf: stored for leaf, stored in found if stored is not None}
