"""GGUF: key values, tensors with blocks of codes among them, all in one file or in several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from loratool.errors import UnsupportedError
from loratool.files.container import Container, KeptLayout, Layout, WeightsFile
from loratool.files.gguf import (
    ALIGNMENT,
    GgufFile,
    aligned,
    edited_values,
    format_header,
    format_values,
    read_gguf,
)
from loratool.files.spec import TensorSpec
from loratool.files.transfer import write_all

__all__ = ["CLAIM", "CONTAINER"]

FIXED: Final = ("general.alignment", "general.architecture")
SPLIT: Final = "split."
"""What the keys begin with that say which part of a model a file is."""
CLAIM: Final = {"suffixes": [".gguf"], "models": [".gguf"], "preference": 0, "splits": [".gguf"]}


@dataclass(frozen=True)
class _Layout:
    """A header, then the data, each tensor at a multiple of the alignment.

    Attributes:
        specs: The tensors in their order.
        head: The header.
        alignment: Of the data.
        is_told: Whether nothing in the header depends on the data.
    """

    specs: tuple[TensorSpec, ...]
    head: bytes
    alignment: int
    is_told: bool = False

    @property
    def header(self) -> bytes:
        return self.head if self.is_told else b""

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        places, offset = {}, aligned(len(self.head), self.alignment)
        for spec in self.specs:
            places[spec.name] = offset
            offset = aligned(offset + spec.nbytes, self.alignment)
        return places

    @cached_property
    def size(self) -> int:
        ends = (self.offsets[spec.name] + spec.nbytes for spec in self.specs[-1:])
        return aligned(next(ends, len(self.head)), self.alignment)

    def seal(self, descriptor: int, metadata: Mapping[str, str], *, path: Path) -> None:
        """See :class:`Layout`; what fills up the tensors is zero already in a new file."""
        if self.is_told:
            return
        head = format_header(self.specs, *format_values(metadata), self.alignment)
        if len(head) != len(self.head):
            raise ValueError(f"{path}: the metadata are not as long as was said")
        end = 0
        for begin, size, data in (
            (0, len(head), head),
            *((self.offsets[spec.name], spec.nbytes, b"") for spec in self.specs),
            (self.size, 0, b""),
        ):
            write_all(descriptor, memoryview(bytes(begin - end)), end)
            write_all(descriptor, memoryview(data), begin)
            end = begin + size


class _Gguf:
    name: Final = "GGUF"
    keeps_codes: Final = True
    has_metadata: Final = True

    def open(self, path: Path) -> GgufFile:
        """See :class:`Container`."""
        return read_gguf(path)

    def lay_out(
        self,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        name: str,
        like: WeightsFile | None = None,
    ) -> Layout:
        """See :class:`Container`; of another file of this format all key values are kept."""
        if isinstance(like, GgufFile):
            return _like(specs, like)
        alignment = int(metadata.get("general.alignment", ALIGNMENT))
        head = format_header(specs, *format_values(metadata), alignment)
        return _Layout(tuple(specs), head, alignment)

    def beginning(self, file: WeightsFile, changes: Mapping[str, str | None]) -> bytes:
        """See :class:`Telling`; a key value keeps its type, a new one is of the type of its key."""
        assert isinstance(file, GgufFile)
        for key in changes:
            if key in FIXED or key.startswith(SPLIT):
                raise UnsupportedError(key, "says how the file is laid out, and stays as it is")
        specs = [stored.spec for stored in file.tensors.values()]
        header = format_header(specs, *edited_values(file, changes), file.alignment)
        return header.ljust(aligned(len(header), file.alignment), b"\0")


def _like(specs: Sequence[TensorSpec], like: GgufFile) -> Layout:
    """Return the layout of a file that takes the place of another: the same key values and order.

    A tensor that is stored in another shape than it has is stored so again.
    """
    given = {spec.name: spec for spec in specs}
    names = [*(name for name in like.tensors if name in given)]
    names += [spec.name for spec in specs if spec.name not in like.tensors]
    ordered = []
    for name in names:
        old = like.tensors.get(name)
        is_same = old is not None and old.spec.elements == given[name].elements
        shape = old.spec.shape if old is not None and is_same else given[name].shape
        ordered.append(replace(given[name], shape=shape))
    if ordered == [stored.spec for stored in like.tensors.values()]:
        return KeptLayout(like)
    head = format_header(ordered, like.raw_values, len(like.values), like.alignment)
    return _Layout(tuple(ordered), head, like.alignment, is_told=True)


CONTAINER: Final[Container] = _Gguf()
