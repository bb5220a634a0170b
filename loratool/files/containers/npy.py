"""TensorRT-LLM's pair of NumPy arrays: rows of numbers, and what each row is. It is only read.

``model.lora_weights.npy`` has one row for each adapted module, filled up with zeros;
``model.lora_config.npy`` beside it says its module, its layer, its rank, and whether there are
magnitudes too. A row is called ``layer.<n>.module.<id>.rank.<r>``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.container import Container, Layout, WeightsFile
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import stamp_of
from loratool.files.npy import NpyHeader, read_npy_header
from loratool.files.sources import opened
from loratool.files.spec import StoredTensor, TensorSpec

__all__ = ["CLAIM", "CONTAINER"]

CLAIM: Final = {"suffixes": [".npy"]}

WEIGHTS: Final = "lora_weights"
CONFIG: Final = "lora_config"
MOST_ROWS: Final = 1 << 17
DORA: Final = ".dora"


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
            raise FileFormatError(weights, f"cannot be read: {error.strerror}") from None
        if stamp.size != header.size + header.nbytes or header.is_turned:
            raise FileFormatError(weights, "its array is not as long as it says, or turned")
        if header.shape[-2:-1] != (len(rows),) or len(header.shape) not in (2, 3):
            raise FileFormatError(
                weights, f"has the shape {list(header.shape)}, expected {len(rows)} rows"
            )
        return WeightsFile(weights, _tensors(weights, header, rows), {}, stamp.size, stamp)

    def lay_out(
        self,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        name: str,
        like: WeightsFile | None = None,
    ) -> Layout:
        """See :class:`Container`; refuse to."""
        raise UnsupportedError(
            name,
            "would be a .npy file",
            hint="write PEFT's scheme, which TensorRT-LLM reads too: --to peft",
        )


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
        raise FileFormatError(
            path, f"cannot be read: {error.strerror}", hint="both files of the pair are needed"
        ) from None
    if len(data) != header.nbytes:
        raise FileFormatError(path, "is not as long as it says")
    return list(struct.iter_unpack(f"<{width}i", data))


CONTAINER: Final[Container] = _Npy()
