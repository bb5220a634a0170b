"""Safetensors: a header, then the data of the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from loratool.files.container import Container, WeightsFile
from loratool.files.safetensors import format_header, read_header
from loratool.files.spec import TensorSpec
from loratool.files.transfer import write_all

__all__ = ["CLAIM", "CONTAINER"]

CLAIM: Final = {"suffixes": [".safetensors"], "models": [".safetensors"], "preference": 2}


@dataclass(frozen=True)
class _Layout:
    specs: tuple[TensorSpec, ...]
    header: bytes

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        places, offset = {}, len(self.header)
        for spec in self.specs:
            places[spec.name] = offset
            offset += spec.nbytes
        return places

    @property
    def size(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.specs)

    def seal(self, descriptor: int, metadata: Mapping[str, str], *, path: Path) -> None:
        """See :class:`Layout`."""
        header = format_header(self.specs, metadata)
        if len(header) != len(self.header):
            raise ValueError(f"{path}: the metadata are not as long as was said")
        write_all(descriptor, memoryview(header), 0)


class _Safetensors:
    name: Final = "safetensors"
    has_metadata: Final = True

    def open(self, path: Path) -> WeightsFile:
        """See :class:`Container`."""
        return read_header(path)

    def lay_out(
        self, specs: Sequence[TensorSpec], metadata: Mapping[str, str], name: str
    ) -> _Layout:
        """See :class:`Container`."""
        return _Layout(tuple(specs), format_header(specs, metadata))


CONTAINER: Final[Container] = _Safetensors()
