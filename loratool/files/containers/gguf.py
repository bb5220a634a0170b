"""GGUF: key values, tensors with blocks of codes among them, all in one file or in several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from loratool.files.container import Container
from loratool.files.gguf import (
    ALIGNMENT,
    GgufFile,
    aligned,
    format_header,
    format_values,
    read_gguf,
)
from loratool.files.spec import TensorSpec
from loratool.files.transfer import write_all

__all__ = ["CLAIM", "CONTAINER"]

CLAIM: Final = {"suffixes": [".gguf"], "models": [".gguf"], "preference": 0, "splits": [".gguf"]}


@dataclass(frozen=True)
class _Layout:
    specs: tuple[TensorSpec, ...]
    head: bytes
    alignment: int
    header: bytes = b""

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
        """See :class:`Layout`."""
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
    has_metadata: Final = True

    def open(self, path: Path) -> GgufFile:
        """See :class:`Container`."""
        return read_gguf(path)

    def lay_out(
        self, specs: Sequence[TensorSpec], metadata: Mapping[str, str], name: str
    ) -> _Layout:
        """See :class:`Container`; ``general.alignment`` is kept."""
        alignment = int(metadata.get("general.alignment", ALIGNMENT))
        head = format_header(specs, *format_values(metadata), alignment)
        return _Layout(tuple(specs), head, alignment)


CONTAINER: Final[Container] = _Gguf()
