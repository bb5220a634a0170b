"""The pickle of a dictionary of tensors, opcode for opcode as ``torch.save`` writes it.

It describes tensors and holds none of their data: the storage ``n`` is the data of the ``n``-th
tensor. Protocol 2, a dozen opcodes, no object is pickled. What occurs again is taken from the
memo, as CPython's pickler does with objects that are the same: the words that torch repeats,
and the functions and types that it names. Names of tensors are spelled out. (The pickler takes
a name from the memo too if it *is* one of torch's words, which a name that was read from a file
never is: only a program that spells out ``{"cpu": tensor}`` gets another file.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import mul
from typing import Final

from loratool.errors import UnsupportedError
from loratool.files.dtypes import DTYPES
from loratool.files.pickle_machine import STORAGE_DTYPES
from loratool.files.spec import TensorSpec

__all__ = ["describe"]

BATCH: Final = 1000
STORAGE_OF: Final = {
    dtype: storage for storage, dtype in STORAGE_DTYPES.items() if storage != "UntypedStorage"
}


def describe(specs: Sequence[TensorSpec]) -> bytes:
    """Return the pickle of a dictionary of contiguous tensors, each with a storage of its own.

    Raises:
        UnsupportedError: torch has no such dtype.
    """
    writer = _Writer()
    writer.new(b"}")
    items = list(enumerate(specs))
    if len(items) == 1:
        writer.item(*items[0])
        writer.plain(b"s")
    elif items:
        # The pickler stops only after a batch that is not full, be it an empty one.
        for start in range(0, len(items) + 1, BATCH):
            writer.plain(b"(")
            for number, spec in items[start : start + BATCH]:
                writer.item(number, spec)
            writer.plain(b"u")
    writer.plain(b".")
    return bytes(writer.written)


class _Writer:
    """Opcodes, and the memo of what they have built."""

    def __init__(self) -> None:
        self.written = bytearray(b"\x80\x02")
        self.memo: dict[bytes, int] = {}
        self.built = 0

    def plain(self, opcodes: bytes) -> None:
        """Write opcodes whose result is not remembered."""
        self.written += opcodes

    def new(self, opcodes: bytes) -> None:
        """Write opcodes whose result is remembered, though never asked for."""
        self.written += opcodes + _indexed(b"q", b"r", self.built)
        self.built += 1

    def shared(self, opcodes: bytes) -> None:
        """Write opcodes whose result is the same object wherever it occurs."""
        if opcodes in self.memo:
            self.written += _indexed(b"h", b"j", self.memo[opcodes])
        else:
            self.memo[opcodes] = self.built
            self.new(opcodes)

    def item(self, number: int, spec: TensorSpec) -> None:
        """Write a name and its tensor."""
        storage = STORAGE_OF.get(spec.dtype)
        torch_name = DTYPES[spec.dtype].torch_name
        if torch_name is None:
            raise UnsupportedError(spec.name, f"torch has no dtype like {spec.dtype}")
        self.new(_text(spec.name))
        # Types that are younger than the format stand beside a storage of plain bytes.
        self.shared(REBUILD if storage else REBUILD_UNTYPED)
        self.plain(b"((")
        self.shared(STORAGE)
        self.shared(_named("torch", storage) if storage else UNTYPED)
        self.new(_text(str(number)))
        self.shared(CPU)
        self.plain(_integer(spec.elements if storage else spec.nbytes))
        self.new(b"t")
        self.plain(b"Q" + _integer(0))
        self._sizes(spec.shape)
        self._sizes(_strides(spec.shape))
        self.plain(b"\x89")  # requires no gradient
        self.shared(HOOKS)  # none of them
        self.plain(b")")
        self.new(b"R")
        if not storage:
            self.shared(_named("torch", torch_name))
        self.new(b"t")
        self.new(b"R")

    def _sizes(self, values: tuple[int, ...]) -> None:
        integers = b"".join(map(_integer, values))
        if not values:
            self.plain(b")")
        elif len(values) <= 3:
            self.new(integers + b"\x85\x86\x87"[len(values) - 1 :][:1])
        else:
            self.new(b"(" + integers + b"t")


def _indexed(short: bytes, long: bytes, index: int) -> bytes:
    return short + bytes((index,)) if index < 256 else long + struct.pack("<I", index)


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _integer(value: int) -> bytes:
    """Return the opcode of an integer that is not negative."""
    if value < 1 << 8:
        return b"K" + struct.pack("<B", value)
    if value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    length = value.bit_length() // 8 + 1
    return b"\x8a" + bytes((length,)) + value.to_bytes(length, "little")


REBUILD: Final = _named("torch._utils", "_rebuild_tensor_v2")
REBUILD_UNTYPED: Final = _named("torch._utils", "_rebuild_tensor_v3")
UNTYPED: Final = _named("torch.storage", "UntypedStorage")
HOOKS: Final = _named("collections", "OrderedDict")
STORAGE: Final = _text("storage")
CPU: Final = _text("cpu")


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor; an empty dimension counts as one."""
    steps: Iterable[int] = (max(size, 1) for size in reversed(shape[1:]))
    return tuple(accumulate(steps, mul, initial=1))[::-1] if shape else ()
