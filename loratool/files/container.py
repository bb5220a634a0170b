"""One weights file, whatever its container; how a container is read and written."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from loratool.errors import FileFormatError, unreadable
from loratool.files.inputs import Stamp
from loratool.files.sources import opened, source_of
from loratool.files.spec import StoredTensor, TensorSpec

__all__ = [
    "Container",
    "KeptLayout",
    "Layout",
    "Telling",
    "WeightsFile",
    "read_bytes",
    "read_view",
]

WORDS: Final = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}
"""Bytes of an element to a numpy dtype that moves as one word."""


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """One file whose description has been read and checked; no tensor data has.

    Attributes:
        path: The file.
        tensors: By name, in the order of their data.
        metadata: What the file says of itself; empty where it has none.
        size: Size of the whole file in bytes.
        stamp: What the file was when it was read.
        header: The raw bytes before the data, of a file that may be copied and keeps its layout.
        notes: What else it holds and was not read, one sentence each.
        groups: What its names begin with, where it holds them in dictionaries of these names.
        others: Further files that its tensors lie in, and what they were.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    size: int
    stamp: Stamp
    header: bytes | None = None
    notes: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    others: Mapping[Path, Stamp] = field(default_factory=dict)

    @property
    def stamps(self) -> dict[Path, Stamp]:
        """What every file that is read was, its own first."""
        return {self.path: self.stamp, **self.others}


class Layout(Protocol):
    """Where everything lies in a file that will be written."""

    @property
    def size(self) -> int:
        """Size of the whole file in bytes."""
        ...

    @property
    def offsets(self) -> Mapping[str, int]:
        """Where the data of each tensor begin, by name; contiguous, little-endian."""
        ...

    @property
    def header(self) -> bytes:
        """The bytes before the data where nothing else surrounds them, else none."""
        ...

    def seal(self, descriptor: int, metadata: Mapping[str, str], *, path: Path) -> None:
        """Write what surrounds the data, which stand at their places.

        Args:
            descriptor: The file, open for reading and writing, as long as it will be.
            metadata: As long as those of the layout; what had to be known of the data is in them.
            path: The file's name, for messages.
        """
        ...


@dataclass(frozen=True)
class KeptLayout:
    """Where everything lies in a file that has been read, for one that is laid out like it."""

    original: WeightsFile

    @property
    def size(self) -> int:
        """See :class:`Layout`."""
        return self.original.size

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        """See :class:`Layout`."""
        return {name: stored.offset for name, stored in self.original.tensors.items()}

    @property
    def header(self) -> bytes:
        """See :class:`Layout`."""
        return self.original.header or b""

    def seal(self, descriptor: int, metadata: Mapping[str, str], *, path: Path) -> None:
        """Write nothing: the header is known before the data."""


class Container(Protocol):
    """A format of weights files.

    Attributes:
        name: What it is called in messages.
        has_metadata: Whether a file has a place for metadata.
        keeps_codes: Whether weights may be coded or not one by one, as their dtypes say: what
            nobody changes then stays coded beside what somebody does.
    """

    @property
    def name(self) -> str: ...

    @property
    def has_metadata(self) -> bool: ...

    @property
    def keeps_codes(self) -> bool: ...

    def open(self, path: Path) -> WeightsFile:
        """Read the description of a file, and no tensor data.

        Raises:
            FileFormatError: The file breaks a rule of the format; the message says which.
        """
        ...

    def lay_out(
        self,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        name: str,
        like: WeightsFile | None = None,
    ) -> Layout:
        """Find out where everything lies in a file of these tensors.

        Args:
            specs: The tensors, in the order of their data.
            metadata: As long as what will be written.
            name: The name of the file.
            like: A file of a model, of any container, that this one takes the place of: where
                nothing in it moves it is laid out like it, and what it says besides is kept. The
                order of the tensors is then the container's to choose.

        Raises:
            UnsupportedError: The format is only read, or has no such dtype.
        """
        ...


@runtime_checkable
class Telling(Protocol):
    """A container whose files say something of themselves before their data, and may say other."""

    def beginning(self, file: WeightsFile, changes: Mapping[str, str | None]) -> bytes:
        """Return what a file begins with, up to its data, if it said something else.

        Args:
            file: The file; its tensors stay in their order.
            changes: By key what it says instead, or ``None`` where it says nothing any more.

        Raises:
            UnsupportedError: A key means something else, or has to be where it is.
        """
        ...


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

    sizes, strides = stored.layout
    width = stored.spec.nbytes // math.prod(sizes)
    flat = np.frombuffer(data, dtype=np.dtype(WORDS.get(width, f"V{width}")))
    view = np.lib.stride_tricks.as_strided(
        flat, sizes, [stride * width for stride in strides], writeable=False
    )
    return np.ascontiguousarray(view).reshape(-1).view(np.uint8).data


def _read(stored: StoredTensor) -> bytes:
    if stored.whole is not None:
        return stored.whole.read()[stored.offset : stored.offset + stored.span]
    source = source_of(stored.path)
    if source is not None:
        view = bytearray(stored.span)
        source.read_into(memoryview(view), stored.offset)
        return bytes(view)
    try:
        with opened(stored.path) as file:
            data = os.pread(file.fileno(), stored.span, stored.offset)
            while len(data) < stored.span:
                more = os.pread(file.fileno(), stored.span - len(data), stored.offset + len(data))
                if not more:
                    raise FileFormatError(stored.path, "became shorter while it was read")
                data += more
    except OSError as error:
        raise unreadable(stored.path, error) from None
    return data
