"""The header of NumPy's ``.npy``: a dtype, an order, a shape. Nothing in it is evaluated."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from loratool.errors import FileFormatError
from loratool.files.dtypes import DTYPES

__all__ = ["MAGIC", "SHAPES", "NpyHeader", "format_npy_header", "read_npy_header"]

MAGIC: Final = b"\x93NUMPY"
SHAPES: Final = "model.lora_shapes.json"
"""Beside a pair of arrays for TensorRT-LLM that loratool wrote: inputs and outputs of each row."""
LONGEST: Final = 4096
"""Bytes of a header; those of arrays of numbers have about a hundred."""
MOST_SIDES: Final = 8
HEADER: Final = re.compile(
    r"\{\s*'descr': '(?P<descr>[^']{1,32})', 'fortran_order': (?P<order>True|False), "
    r"'shape': \((?P<shape>[0-9, ]*)\),?\s*\}\s*",
    re.ASCII,
)
KINDS: Final = {
    "f2": "F16",
    "f4": "F32",
    "f8": "F64",
    "V2": "BF16",
    "i1": "I8",
    "i2": "I16",
    "i4": "I32",
    "i8": "I64",
    "u1": "U8",
    "u2": "U16",
    "u4": "U32",
    "u8": "U64",
    "b1": "BOOL",
}
"""Kinds and bytes of elements. NumPy has no bfloat16: mlx and TensorRT-LLM store its bits as V2."""
UNORDERED: Final = ("V2", "i1", "u1", "b1")
"""Kinds whose bytes have no order."""
ALIGNMENT: Final = 64
ROOM: Final = 21
"""Letters that NumPy leaves for the first side, which may grow."""


@dataclass(frozen=True, slots=True)
class NpyHeader:
    """What the header says.

    Attributes:
        dtype: As in a safetensors header.
        shape: The sides.
        is_turned: Whether the first index runs fastest.
        size: Bytes of the header; the data follow it.
    """

    dtype: str
    shape: tuple[int, ...]
    is_turned: bool
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return DTYPES[self.dtype].size(math.prod(self.shape))

    @property
    def strides(self) -> tuple[int, ...] | None:
        """Element strides, where they are not those of a row-major array."""
        if not self.is_turned or sum(side > 1 for side in self.shape) < 2:
            return None
        found, step = [], 1
        for side in self.shape:
            found.append(step)
            step *= side
        return tuple(found)


def read_npy_header(path: Path, name: str, file: IO[bytes]) -> NpyHeader:
    """Read a header from where a file stands.

    Args:
        path: The file, for messages.
        name: The array in it, for messages.
        file: The file.

    Raises:
        FileFormatError: There is none, or it is of an array that is not read.
    """
    start = file.read(len(MAGIC) + 2)
    if start[: len(MAGIC)] != MAGIC or len(start) < len(MAGIC) + 2:
        raise FileFormatError(path, f"{name} is no array of NumPy's (.npy)")
    width = {1: 2, 2: 4, 3: 4}.get(start[len(MAGIC)])
    if width is None or start[-1]:
        raise FileFormatError(path, f"{name} is of an unknown version of .npy")
    length = int.from_bytes(file.read(width), "little")
    if not 0 < length <= LONGEST:
        raise FileFormatError(path, f"{name} has a header of {length} bytes")
    data = file.read(length)
    if len(data) < length:
        raise FileFormatError(path, f"{name} is truncated")
    match = HEADER.fullmatch(data.decode("latin-1"))
    if match is None:
        raise FileFormatError(
            path, f"{name} is no plain array: its header is {data[:80].decode('latin-1')!r}"
        )
    descr = match["descr"]
    if "O" in descr:
        raise FileFormatError(path, f"{name} holds Python objects (a pickle), which is not read")
    if descr.startswith(">"):
        raise FileFormatError(path, f"{name} is big-endian, which is not supported")
    dtype = KINDS.get(descr.lstrip("<|="))
    if dtype is None:
        raise FileFormatError(path, f"{name} has the dtype {descr!r}, which is not read")
    texts = [text.strip() for text in match["shape"].split(",") if text.strip()]
    if len(texts) > MOST_SIDES or any(not text.isdigit() or len(text) > 12 for text in texts):
        raise FileFormatError(path, f"{name} has no plausible shape: ({match['shape']})")
    shape = tuple(int(text) for text in texts)
    size = len(start) + width + length
    return NpyHeader(dtype, shape, match["order"] == "True", size)


def format_npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the header of a row-major array, byte for byte as ``numpy.save`` writes it.

    Raises:
        KeyError: NumPy has no such dtype.
    """
    kind = {known: kind for kind, known in KINDS.items()}[dtype]
    descr = f"{'|' if kind in UNORDERED else '<'}{kind}"
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (ROOM - len(str(shape[0])) if shape else 0)
    start = len(MAGIC) + 4
    text += " " * (-(start + len(text) + 1) % ALIGNMENT) + "\n"
    return MAGIC + b"\1\0" + len(text).to_bytes(2, "little") + text.encode("latin-1")
