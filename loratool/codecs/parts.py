"""The stored tensors behind a coded weight: read from files, looked up, and made numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Description
from loratool.codecs.numbers import decode
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import InputFiles
from loratool.files.rows import RowBytes
from loratool.files.spec import StoredTensor
from loratool.files.transfer import read_into

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["FileParts", "beside", "needed", "refuse_rotated", "scales"]

KEPT: Final = 1 << 20
"""Reads of this many bytes and more are kept till the next one of their part: neighbours often want
the same."""
WHOLE: Final = 32 << 20
"""A part up to this size is read as a whole when some of its columns are wanted."""


class FileParts:
    """The parts of one weight, in files. Safe to use from several threads.

    Args:
        parts: All of them.
        files: Where descriptors come from.
    """

    def __init__(self, parts: Mapping[str, StoredTensor], files: InputFiles) -> None:
        self._files = files
        self._rows = {part: RowBytes(part, _width(part), files) for part in parts.values()}
        self._kept: dict[StoredTensor, tuple[int, int, memoryview]] = {}

    def rows(self, part: StoredTensor, start: int, stop: int) -> memoryview:
        """Return the bytes of some rows; a scalar has one."""
        kept = self._kept.get(part)
        if kept is not None and kept[:2] == (start, stop):
            return kept[2]
        data = self._rows[part].read(start, stop - start)
        if len(data) >= KEPT:
            self._kept[part] = (start, stop, data)
        return data

    def columns(
        self, part: StoredTensor, start: int, stop: int, rows: tuple[int, int] | None = None
    ) -> memoryview:
        """Return the bytes of some columns of some rows, row by row."""
        first, last = rows or (0, part.spec.shape[0])
        size_of, width = DTYPES[part.spec.dtype].size, _width(part)
        row, skipped, size = size_of(width), size_of(start), size_of(stop) - size_of(start)
        is_small = last - first != 1 and (last - first) * row <= WHOLE
        if not part.is_run or is_small:
            whole = np.frombuffer(self.rows(part, first, last), np.uint8)
            cut = whole.reshape(last - first, -1)[:, skipped : skipped + size]
            return np.ascontiguousarray(cut).reshape(-1).data
        found = memoryview(bytearray((last - first) * size))
        with self._files.using(part.path) as descriptor:
            for number in range(last - first):
                offset = part.offset + (first + number) * row + skipped
                view = found[number * size : (number + 1) * size]
                read_into(descriptor, view, offset, path=part.path)
        return found


def _width(part: StoredTensor) -> int:
    """Return the elements of one row along the first axis; a scalar is one row."""
    return math.prod(part.spec.shape[1:])


def needed(tensors: Mapping[str, StoredTensor], module: str, leaf: str, why: str) -> StoredTensor:
    """Return the tensor ``leaf`` of a module that has to be there.

    Args:
        tensors: All of the model.
        module: Its path.
        leaf: What comes after its path and a dot.
        why: What it belongs to, such as ``bitsandbytes codes``.

    Raises:
        FileFormatError: It is not there.
    """
    found = tensors.get(f"{module}.{leaf}")
    if found is None:
        raise FileFormatError(
            module,
            f"has {why}, but no {leaf!r} beside them",
            hint="download the model again, or the shard that is missing",
        )
    return found


def beside(
    tensors: Mapping[str, StoredTensor], module: str, leaves: tuple[str, ...]
) -> dict[str, StoredTensor]:
    """Return those of the tensors ``leaves`` that a module has, by these."""
    found = ((leaf, tensors.get(f"{module}.{leaf}")) for leaf in leaves)
    return {leaf: stored for leaf, stored in found if stored is not None}


def refuse_rotated(module: str, said: Description) -> None:
    """Refuse weights of compressed-tensors that were turned before they were quantised.

    Raises:
        UnsupportedError: The configuration names such transforms.
    """
    told = said.quantization.get("transform_config")
    if isinstance(told, Mapping) and told.get("config_groups"):
        raise UnsupportedError(
            module,
            "is a weight that was rotated before it was quantised (transform_config)",
            hint="merge on the 16-bit original, which adapters are for",
        )


def scales(
    part: StoredTensor,
    data: Any,
    shape: tuple[int, ...],
    kind: DTypeLike = np.float64,
    *,
    dtype: str | None = None,
) -> NDArray[Any]:
    """Return the numbers in ``data``, bytes of a part, all of which have to be finite.

    Args:
        part: The part, for errors.
        data: Its bytes, or some of them.
        shape: Of the result.
        kind: Of the result.
        dtype: What they are, where a header calls them otherwise.

    Raises:
        FileFormatError: One is NaN or infinite.
    """
    found = decode(data, dtype or part.spec.dtype, shape, kind)
    if not np.isfinite(found).all():
        raise FileFormatError(
            part.spec.name,
            "has a scale that is NaN or infinite",
            hint="the file is damaged: download or quantise it again",
        )
    return found
