"""Safetensors headers: parsed against every rule of the format, and formatted as its authors do.

The rules are those of the reference implementation (huggingface/safetensors, ``tensor.rs``):
an unsigned little-endian 64-bit length, that many bytes of JSON, then the data; offsets relative
to the data, gapless from 0 to the end of the file. Two things are stricter here: a duplicate key
is refused (the reference keeps the last one), and so is a header that a tensor's size overflows.
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from loratool.errors import FileFormatError, UnsupportedError, unreadable
from loratool.files.container import WeightsFile
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import stamp_of
from loratool.files.json import LFS_PREFIX, parse_json
from loratool.files.sources import opened
from loratool.files.spec import StoredTensor, TensorSpec

__all__ = ["MAX_HEADER_BYTES", "canonical_order", "format_header", "read_header"]

MAX_HEADER_BYTES: Final = 100_000_000
MAX_SIZE: Final = 1 << 62
MAX_DIMENSIONS: Final = 64
MAX_TENSORS: Final = 200_000
"""No model has as many; a header of a hundred megabytes of them would only cost memory."""
METADATA_KEY: Final = "__metadata__"


def read_header(path: Path) -> WeightsFile:
    """Read and check the header of ``path``.

    Raises:
        FileFormatError: The file breaks a rule of the format; the message says which.
    """
    try:
        with opened(path) as file:
            stamp = stamp_of(file)
            size = stamp.size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise FileFormatError(path, _not_safetensors(prefix, size))
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES or length > size - 8:
                start = prefix + file.read(64)
                raise FileFormatError(path, _bad_length(start, length, size))
            text = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from None
    if not text.lstrip(b" ").startswith(b"{"):
        raise FileFormatError(path, _not_safetensors(prefix + text[:64], size))
    if text.count(b"{") > MAX_TENSORS or text.count(b"[") > 2 * MAX_TENSORS:
        raise FileFormatError(path, f"header: more than {MAX_TENSORS} tensors, or no header")
    fields = parse_json(text, where=f"{path}: header")
    metadata = _check_metadata(path, fields.pop(METADATA_KEY, None))
    tensors = _check_tensors(path, fields, data_start=8 + length, file_size=size)
    return WeightsFile(path, tensors, metadata, size, stamp, prefix + text)


def canonical_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Return ``specs`` in the order in which the format's own library stores them."""
    rank = {name: index for index, name in enumerate(DTYPES)}
    return sorted(specs, key=lambda spec: (-rank[spec.dtype], spec.name))


def format_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file that stores ``specs`` in the given order.

    The bytes are those of the reference writer: compact JSON, padded with spaces so that the
    data begins at a multiple of eight; metadata in sorted order, so that they never vary.

    Raises:
        UnsupportedError: The format has no such dtype.
    """
    fields: dict[str, Any] = {}
    if metadata:
        fields[METADATA_KEY] = dict(sorted(metadata.items()))
    offset = 0
    for spec in specs:
        if DTYPES[spec.dtype].block is not None:
            raise UnsupportedError(
                spec.name, f"is {spec.dtype}, blocks of GGUF, which safetensors does not have"
            )
        end = offset + spec.nbytes
        fields[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bad_length(start: bytes, length: int, size: int) -> str:
    if start.startswith(LFS_PREFIX) or start[:1] in b"<P\x80":
        return _not_safetensors(start, size)
    if length > MAX_HEADER_BYTES:
        return (
            f"the header claims {length} bytes, the format allows {MAX_HEADER_BYTES}; "
            "this is not a safetensors file, or a damaged one"
        )
    return f"truncated: the header claims {length} bytes, the file has {size} in all"


def _not_safetensors(start: bytes, size: int) -> str:
    if start.startswith(LFS_PREFIX):
        return "a git-LFS pointer, not the weights; fetch them with 'git lfs pull'"
    if size == 0:
        return "the file is empty"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "a torch pickle, not a safetensors file; rename it to .bin"
    if start.lstrip()[:1] == b"<":
        return "a web page or XML text, not a safetensors file; the download went wrong"
    return "not a safetensors file"


def _check_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise FileFormatError(path, "header: __metadata__ must map strings to strings")
    return metadata


def _check_tensors(
    path: Path, fields: dict[str, Any], *, data_start: int, file_size: int
) -> dict[str, StoredTensor]:
    placed: list[tuple[int, int, TensorSpec]] = []
    for name in list(fields):
        # What has been looked at is let go, so that both forms never stand whole.
        spec, begin, end = _check_field(path, name, fields.pop(name))
        placed.append((begin, end, spec))
    placed.sort(key=lambda item: item[:2])
    expected = 0
    for begin, end, spec in placed:
        if begin != expected:
            kind = "overlaps the one before" if begin < expected else "leaves a hole before it"
            raise FileFormatError(
                path,
                f"header: tensor {spec.name!r} begins at {begin}, which {kind} "
                f"(expected {expected})",
            )
        expected = end
    if data_start + expected != file_size:
        state = "truncated" if data_start + expected > file_size else "has trailing bytes"
        raise FileFormatError(
            path,
            f"{state}: the header describes {data_start + expected} bytes, the file has "
            f"{file_size}",
        )
    return {spec.name: StoredTensor(spec, path, data_start + begin) for begin, _, spec in placed}


def _are_sizes(values: list[Any]) -> bool:
    for value in values:  # noqa: SIM110 - a generator takes twice as long
        if type(value) is not int or not 0 <= value < MAX_SIZE:
            return False
    return True


def _wrong(path: Path, name: str, what: str) -> FileFormatError:
    return FileFormatError(path, f"header: tensor {reprlib.repr(name)} {what}")


def _check_field(path: Path, name: str, field: Any) -> tuple[TensorSpec, int, int]:
    if not isinstance(field, dict):
        raise _wrong(path, name, f"is described by {type(field).__name__}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _wrong(path, name, "has a name that is no text") from None
    dtype, shape, offsets = field.get("dtype"), field.get("shape"), field.get("data_offsets")
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if kind is None or kind.block is not None:
        raise _wrong(path, name, f"has the unknown dtype {reprlib.repr(dtype)}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not _are_sizes(shape)
        or math.prod(shape) >= MAX_SIZE
    ):
        raise _wrong(path, name, f"has the impossible shape {reprlib.repr(shape)}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not _are_sizes(offsets)
        or offsets[0] > offsets[1]
    ):
        raise _wrong(path, name, f"has the impossible offsets {reprlib.repr(offsets)}")
    begin, end = offsets
    bits = math.prod(shape) * kind.bits
    if bits != 8 * (end - begin):
        raise _wrong(
            path, name, f"has {end - begin} bytes, but {dtype} {shape} takes {-(-bits // 8)}"
        )
    return TensorSpec(name, kind.name, tuple(shape)), begin, end
