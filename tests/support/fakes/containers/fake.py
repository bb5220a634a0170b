"""A container of no real format: lines of text that describe the tensors, then their data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import FileFormatError
from loratool.files.container import WeightsFile
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import stamp_of
from loratool.files.spec import StoredTensor, TensorSpec

CLAIM = {"suffixes": [".fake"], "models": [".fake"]}
MAGIC, END = "FAKE", "END"


def head(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    lines = [MAGIC, json.dumps(dict(sorted(metadata.items())))]
    lines += [json.dumps([spec.name, spec.dtype, spec.shape]) for spec in specs]
    return "".join(f"{line}\n" for line in (*lines, END)).encode()


@dataclass(frozen=True)
class FakeLayout:
    specs: tuple[TensorSpec, ...]
    offsets: Mapping[str, int]
    size: int
    header: bytes = b""

    def seal(self, descriptor: int, metadata: Mapping[str, str], *, path: Path) -> None:
        os.pwrite(descriptor, head(self.specs, metadata), 0)


class Fake:
    name = "fake"
    has_metadata = True
    keeps_codes = False

    def open(self, path: Path) -> WeightsFile:
        stamp = stamp_of(path)
        tensors: dict[str, StoredTensor] = {}
        try:
            with path.open("rb") as file:
                if file.readline() != f"{MAGIC}\n".encode():
                    raise FileFormatError(path, "is no fake")
                metadata = json.loads(file.readline())
                specs = []
                while (line := file.readline()) != f"{END}\n".encode():
                    name, dtype, shape = json.loads(line)
                    specs.append(TensorSpec(name, DTYPES[dtype].name, tuple(shape)))
                place = file.tell()
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(path, f"is a broken fake: {error}") from None
        for spec in specs:
            tensors[spec.name] = StoredTensor(spec, path, place)
            place += spec.nbytes
        if place != stamp.size:
            raise FileFormatError(path, f"describes {place} bytes and has {stamp.size}")
        return WeightsFile(path, tensors, metadata, stamp.size, stamp)

    def lay_out(
        self, specs: Sequence[TensorSpec], metadata: Mapping[str, str], name: str, like: Any = None
    ) -> FakeLayout:
        place, offsets = len(head(specs, metadata)), {}
        for spec in specs:
            offsets[spec.name] = place
            place += spec.nbytes
        return FakeLayout(tuple(specs), offsets, place)

    def beginning(self, file: WeightsFile, changes: Mapping[str, str | None]) -> bytes:
        said = {**file.metadata, **changes}
        metadata = {key: text for key, text in said.items() if text is not None}
        return head([stored.spec for stored in file.tensors.values()], metadata)


CONTAINER = Fake()
