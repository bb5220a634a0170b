"""Safetensors: a header, then the data of the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from loratool.errors import UnsupportedError
from loratool.files.container import Container, KeptLayout, Layout, WeightsFile
from loratool.files.safetensors import (
    MAX_HEADER_BYTES,
    canonical_order,
    format_header,
    read_header,
)
from loratool.files.spec import TensorSpec
from loratool.files.transfer import write_all

__all__ = ["CLAIM", "CONTAINER"]

SUFFIX: Final = ".safetensors"
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
    keeps_codes: Final = False
    has_metadata: Final = True

    def open(self, path: Path) -> WeightsFile:
        """See :class:`Container`."""
        return read_header(path)

    def lay_out(
        self,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        name: str,
        like: WeightsFile | None = None,
    ) -> Layout:
        """See :class:`Container`."""
        if like is None:
            return _Layout(tuple(specs), format_header(specs, metadata))
        if _stays(specs, metadata, like):
            return KeptLayout(like)
        ordered = tuple(canonical_order(specs))
        return _Layout(ordered, format_header(ordered, metadata))

    def beginning(self, file: WeightsFile, changes: Mapping[str, str | None]) -> bytes:
        """See :class:`Telling`."""
        said = {**file.metadata, **changes}
        metadata = {key: text for key, text in said.items() if text is not None}
        header = format_header([stored.spec for stored in file.tensors.values()], metadata)
        if len(header) - 8 > MAX_HEADER_BYTES:
            raise UnsupportedError(
                file.path, f"would say too much: the format allows {MAX_HEADER_BYTES} bytes"
            )
        return header


def _stays(specs: Sequence[TensorSpec], metadata: Mapping[str, str], like: WeightsFile) -> bool:
    """Whether a file of this container has these tensors, in any order, and says the same."""
    if like.header is None or like.path.suffix.lower() != SUFFIX or like.metadata != metadata:
        return False
    stored = like.tensors
    return len(specs) == len(stored) and all(
        spec.name in stored and stored[spec.name].spec == spec for spec in specs
    )


CONTAINER: Final[Container] = _Safetensors()
