"""One weights file, whichever of the two containers it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from loratool.errors import FileFormatError
from loratool.files.pickles import TorchPickle, read_pickle
from loratool.files.safetensors import SafetensorsFile, read_header
from loratool.files.spec import StoredTensor

__all__ = [
    "PICKLE_SUFFIXES",
    "WEIGHT_SUFFIXES",
    "WeightsFile",
    "open_weights",
    "read_bytes",
    "read_view",
]

PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES: Final = (".safetensors", *PICKLE_SUFFIXES)

WORDS: Final = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}
"""Bytes of an element to a numpy dtype that moves as one word."""

WeightsFile = SafetensorsFile | TorchPickle


def open_weights(path: Path) -> WeightsFile:
    """Read the description of a weights file; its container is told by its ending.

    Raises:
        FileFormatError: The ending is unknown, or the file breaks its format's rules.
    """
    if not path.exists():
        raise FileFormatError(path, "no such file")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return read_header(path)
    if suffix in PICKLE_SUFFIXES:
        return read_pickle(path)
    raise FileFormatError(path, f"not a weights file: expected one of {', '.join(WEIGHT_SUFFIXES)}")


def read_bytes(stored: StoredTensor) -> bytes:
    """Read one whole tensor as contiguous row-major bytes.

    Raises:
        FileFormatError: The file has changed or cannot be read any more.
    """
    return _read(stored) if stored.strides is None else bytes(read_view(stored))


def read_view(stored: StoredTensor) -> memoryview:
    """Read one whole tensor as contiguous row-major bytes, without a further copy of them.

    Raises:
        FileFormatError: The file has changed or cannot be read any more.
    """
    data = _read(stored)
    if stored.strides is None or not stored.spec.elements:
        return memoryview(data)
    import numpy as np

    width = stored.spec.nbytes // stored.spec.elements
    flat = np.frombuffer(data, dtype=np.dtype(WORDS.get(width, f"V{width}")))
    view = np.lib.stride_tricks.as_strided(
        flat, stored.spec.shape, [stride * width for stride in stored.strides], writeable=False
    )
    return np.ascontiguousarray(view).reshape(-1).view(np.uint8).data


def _read(stored: StoredTensor) -> bytes:
    try:
        with stored.path.open("rb") as file:
            data = os.pread(file.fileno(), stored.span, stored.offset)
            while len(data) < stored.span:
                more = os.pread(file.fileno(), stored.span - len(data), stored.offset + len(data))
                if not more:
                    raise FileFormatError(stored.path, "became shorter while it was read")
                data += more
    except OSError as error:
        raise FileFormatError(stored.path, f"cannot be read: {error.strerror}") from None
    return data
