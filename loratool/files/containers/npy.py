"""TensorRT-LLM's pair of NumPy arrays: rows of numbers, and what each row is.

``model.lora_weights.npy`` has one row for each adapted module, filled up with zeros;
``model.lora_config.npy`` beside it says its module, its layer, its rank, and whether there are
magnitudes too. A row is called ``layer.<n>.module.<id>.rank.<r>``. Both halves of one that is
written are called ``layer.<n>.module.<id>.in`` and ``.out``; the table is written by who knows what
the numbers mean.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from loratool.errors import FileFormatError, UnsupportedError, unreadable
from loratool.files.container import Container, Layout, WeightsFile
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import stamp_of
from loratool.files.json import read_json_object
from loratool.files.npy import SHAPES, NpyHeader, format_npy_header, read_npy_header
from loratool.files.sources import opened
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.files.transfer import write_all

__all__ = ["CLAIM", "CONTAINER"]

CLAIM: Final = {"suffixes": [".npy"]}

WEIGHTS: Final = "lora_weights"
CONFIG: Final = "lora_config"
MOST_ROWS: Final = 1 << 17
DORA: Final = ".dora"
HALF: Final = re.compile(
    r"layer\.(?P<layer>[0-9]{1,9})\.module\.(?P<module>[0-9]{1,9})\.(?P<side>in|out)"
)
WRITTEN: Final = ("F32", "F16", "BF16")
"""What TensorRT-LLM takes."""


@dataclass(frozen=True)
class _Layout:
    """Rows of both halves, filled up with zeros, which a new file has already."""

    header: bytes
    offsets: Mapping[str, int]
    size: int

    def seal(self, descriptor: int, metadata: Mapping[str, str], *, path: Path) -> None:
        """See :class:`Layout`."""
        write_all(descriptor, memoryview(self.header), 0)


class _Npy:
    name: Final = "NumPy arrays of TensorRT-LLM"
    keeps_codes: Final = False
    has_metadata: Final = False

    def open(self, path: Path) -> WeightsFile:
        """See :class:`Container`; either file of the pair stands for both."""
        stem = path.name.replace(CONFIG, WEIGHTS)
        if WEIGHTS not in stem:
            raise FileFormatError(
                path,
                "one array of NumPy's, with no name; TensorRT-LLM's are called "
                "model.lora_weights.npy and model.lora_config.npy",
            )
        weights = path.with_name(stem)
        rows = _rows(path.with_name(stem.replace(WEIGHTS, CONFIG)))
        try:
            with opened(weights) as file:
                stamp = stamp_of(file)
                header = read_npy_header(weights, weights.name, file)
        except OSError as error:
            raise unreadable(weights, error) from None
        if stamp.size != header.size + header.nbytes or header.is_turned:
            raise FileFormatError(weights, "its array is not as long as it says, or turned")
        if header.shape[-2:-1] != (len(rows),) or len(header.shape) not in (2, 3):
            raise FileFormatError(
                weights, f"has the shape {list(header.shape)}, expected {len(rows)} rows"
            )
        tensors = _tensors(weights, header, rows)
        shapes = weights.with_name(SHAPES)
        if shapes.is_file():
            tensors = _halves(shapes, tensors, rows)
        return WeightsFile(weights, tensors, {}, stamp.size, stamp)

    def lay_out(
        self,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        name: str,
        like: WeightsFile | None = None,
    ) -> Layout:
        """See :class:`Container`; in the order of layers and of modules in them."""
        dtypes = {spec.dtype for spec in specs}
        if len(dtypes) != 1 or not dtypes <= set(WRITTEN):
            raise UnsupportedError(
                name,
                f"would hold {', '.join(sorted(dtypes)) or 'nothing'}, and one array has one of "
                f"{', '.join(WRITTEN)}",
                hint="write one dtype with --dtype float16",
            )
        rows: dict[tuple[int, int], dict[str, TensorSpec]] = {}
        for spec in specs:
            match = HALF.fullmatch(spec.name)
            if match is None:
                raise UnsupportedError(spec.name, "is no half of a row of TensorRT-LLM's")
            place = int(match["layer"]), int(match["module"])
            rows.setdefault(place, {})[match["side"]] = spec
        (dtype,) = dtypes
        longest = max(sum(spec.elements for spec in row.values()) for row in rows.values())
        header = format_npy_header(dtype, (1, len(rows), longest))
        offsets = {}
        for index, place in enumerate(sorted(rows)):
            begin = len(header) + DTYPES[dtype].size(index * longest)
            for side in ("in", "out"):
                spec = rows[place][side]
                offsets[spec.name] = begin
                begin += spec.nbytes
        return _Layout(header, offsets, len(header) + DTYPES[dtype].size(len(rows) * longest))


def _tensors(
    path: Path, header: NpyHeader, rows: Sequence[tuple[int, ...]]
) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    longest = header.shape[-1]
    size = DTYPES[header.dtype].size(longest)
    for index, (module, layer, rank, *more) in enumerate(rows):
        name = f"layer.{layer}.module.{module}.rank.{rank}{DORA if any(more) else ''}"
        if name in found or min(module, layer, rank) < 0:
            raise FileFormatError(path, f"row {index} of its configuration is not plausible")
        spec = TensorSpec(name, header.dtype, (longest,))
        found[name] = StoredTensor(spec, path, header.size + index * size)
    return found


def _halves(
    path: Path, tensors: Mapping[str, StoredTensor], rows: Sequence[tuple[int, ...]]
) -> dict[str, StoredTensor]:
    """Return the halves of rows, whose widths a file beside them says.

    Raises:
        FileFormatError: It says something else of them.
    """
    said = read_json_object(path)
    found: dict[str, StoredTensor] = {}
    for (module, layer, rank, *_), row in zip(rows, tensors.values(), strict=True):
        name = f"layer.{layer}.module.{module}"
        widths = said.get(name)
        if (
            not isinstance(widths, list)
            or len(widths) != 2
            or not all(type(each) is int and each > 0 for each in widths)
        ):
            raise FileFormatError(path, f"says {widths!r:.40} of {name}, expected two widths")
        into, out = widths
        if rank * (into + out) > row.spec.elements:
            raise FileFormatError(path, f"says that {name} is longer than its row")
        offset = row.offset
        for side, shape in (("in", (rank, into)), ("out", (out, rank))):
            spec = TensorSpec(f"{name}.{side}", row.spec.dtype, shape)
            found[spec.name] = replace(row, spec=spec, offset=offset)
            offset += spec.nbytes
    return found


def _rows(path: Path) -> list[tuple[int, ...]]:
    """Return what the rows are: module, layer, rank, and whether there are magnitudes.

    Raises:
        FileFormatError: The file is missing, or none of that kind.
    """
    try:
        with opened(path) as file:
            header = read_npy_header(path, path.name, file)
            if header.dtype != "I32" or header.is_turned or len(header.shape) not in (2, 3):
                raise FileFormatError(path, "is no table of whole numbers (int32)")
            *_, count, width = header.shape
            if width not in (3, 4) or count > MOST_ROWS or header.nbytes != 4 * count * width:
                raise FileFormatError(path, f"has the shape {list(header.shape)}")
            data = file.read(header.nbytes + 1)
    except OSError as error:
        raise unreadable(path, error, hint="both files of the pair are needed") from None
    if len(data) != header.nbytes:
        raise FileFormatError(path, "is not as long as it says")
    return list(struct.iter_unpack(f"<{width}i", data))


CONTAINER: Final[Container] = _Npy()
