"""NumPy's ``.npz``: a zip archive with an ``.npy`` for each array. It is only read."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Final

from loratool.errors import FileFormatError, UnsupportedError, unreadable
from loratool.files.container import Container, Layout, WeightsFile
from loratool.files.inputs import Stamp, stamp_of
from loratool.files.json import LFS_PREFIX
from loratool.files.npy import read_npy_header
from loratool.files.sources import opened
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.files.zip_entries import (
    FLAGS,
    FOLDER,
    UTF8,
    DeflatedEntry,
    begin_of,
    check_stored,
    ends_well,
    is_deflated,
    short,
)

__all__ = ["CLAIM", "CONTAINER"]

CLAIM: Final = {"suffixes": [".npz"]}

ENDING: Final = ".npy"
MOST: Final = 100_000
HEAD: Final = 1 << 13
"""Bytes among which the header of a compressed array is."""


class _Npz:
    name: Final = "NumPy archive"
    keeps_codes: Final = False
    has_metadata: Final = False

    def open(self, path: Path) -> WeightsFile:
        """See :class:`Container`; nothing in it is executed."""
        try:
            with opened(path) as file:
                stamp = stamp_of(file)
                start = file.read(64)
                if not start.startswith(b"PK"):
                    raise FileFormatError(path, _not_an_archive(start, stamp.size))
                tensors = _tensors(path, file, stamp)
        except OSError as error:
            raise unreadable(path, error) from None
        except (
            zipfile.BadZipFile,
            struct.error,
            zlib.error,
            EOFError,
            RuntimeError,
            ValueError,
        ) as error:
            # RuntimeError covers encrypted entries and unknown compression.
            raise FileFormatError(path, f"damaged or truncated: {error}") from None
        return WeightsFile(path, tensors, {}, stamp.size, stamp)

    def lay_out(
        self,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        name: str,
        like: WeightsFile | None = None,
    ) -> Layout:
        """See :class:`Container`; refuse to."""
        raise UnsupportedError(name, "would be a .npz file", hint="write a .safetensors file")


def _not_an_archive(start: bytes, size: int) -> str:
    if start.startswith(LFS_PREFIX):
        return "a git-LFS pointer, not the weights; fetch them with 'git lfs pull'"
    return "the file is empty" if size == 0 else "not a file written by numpy.savez"


def _start(file: IO[bytes], info: zipfile.ZipInfo) -> bytes:
    """Return what a compressed array begins with."""
    machine = zlib.decompressobj(-zlib.MAX_WBITS)
    return machine.decompress(file.read(min(info.compress_size, HEAD)), HEAD)


def _tensors(path: Path, file: IO[bytes], stamp: Stamp) -> dict[str, StoredTensor]:
    """Return the arrays, where they lie.

    Raises:
        FileFormatError: The archive is not what it seems, or holds something else.
    """
    found: dict[str, StoredTensor] = {}
    places: list[tuple[int, int]] = []
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len(entries) > MOST:
            raise FileFormatError(path, f"has {len(entries)} entries, too many for an adapter")
        for info in entries:
            name = info.filename.removesuffix(ENDING)
            is_plain = info.filename == info.orig_filename and (
                info.filename.isascii() or info.flag_bits & UTF8
            )
            if not is_plain or info.flag_bits & ~FLAGS or info.external_attr & FOLDER:
                raise FileFormatError(path, f"damaged: {short(info.filename)} is no plain file")
            if name == info.filename or not name:
                raise FileFormatError(path, f"holds {short(info.filename)}, which is no array")
            if name in found:
                raise FileFormatError(path, f"damaged: {short(name)} is in it twice")
            is_packed = is_deflated(path, info)
            if not is_packed:
                check_stored(path, info)
            begin = begin_of(path, file, info)
            file.seek(begin)
            start = io.BytesIO(_start(file, info)) if is_packed else file
            header = read_npy_header(path, short(name), start)
            if (
                info.file_size != header.size + header.nbytes
                or begin + info.compress_size > stamp.size
            ):
                raise FileFormatError(path, f"array {short(name)} is not as long as it says")
            places.append((begin, begin + info.compress_size))
            spec = TensorSpec(name, header.dtype, header.shape)
            stored = StoredTensor(spec, path, begin + header.size, header.strides)
            if is_packed:
                numbers = (begin, info.compress_size, info.file_size, info.CRC, header.size)
                entry = DeflatedEntry(path, info.filename, *numbers, stamp)
                stored = replace(stored, offset=0, whole=entry)
            found[name] = stored
    if not ends_well(file, len(entries)):
        raise FileFormatError(path, "damaged: the end of the archive contradicts its directory")
    places.sort()
    if any(end > after for (_, end), (after, _) in pairwise(places)):
        raise FileFormatError(path, "damaged: two arrays share bytes")
    return found


CONTAINER: Final[Container] = _Npz()
