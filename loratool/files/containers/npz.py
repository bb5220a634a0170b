"""NumPy's ``.npz``: a zip archive with an ``.npy`` for each array. It is only read."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Final

from loratool.errors import FileFormatError, UnsupportedError, unreadable
from loratool.files.container import Container, Layout, WeightsFile
from loratool.files.inputs import stamp_of
from loratool.files.json import LFS_PREFIX
from loratool.files.npy import read_npy_header
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.files.zip_entries import FLAGS, FOLDER, UTF8, begin_of, check_stored, ends_well, short

__all__ = ["CLAIM", "CONTAINER"]

CLAIM: Final = {"suffixes": [".npz"]}

ENDING: Final = ".npy"
MOST: Final = 100_000


class _Npz:
    name: Final = "NumPy archive"
    keeps_codes: Final = False
    has_metadata: Final = False

    def open(self, path: Path) -> WeightsFile:
        """See :class:`Container`; nothing in it is executed."""
        try:
            with path.open("rb") as file:
                stamp = stamp_of(file.fileno())
                start = file.read(64)
                if not start.startswith(b"PK"):
                    raise FileFormatError(path, _not_an_archive(start, stamp.size))
                tensors = _tensors(path, file, stamp.size)
        except OSError as error:
            raise unreadable(path, error) from None
        except (zipfile.BadZipFile, struct.error, EOFError, RuntimeError, ValueError) as error:
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


def _tensors(path: Path, file: IO[bytes], size: int) -> dict[str, StoredTensor]:
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
            check_stored(path, info)
            begin = begin_of(path, file, info)
            file.seek(begin)
            header = read_npy_header(path, short(name), file)
            if info.file_size != header.size + header.nbytes or begin + info.file_size > size:
                raise FileFormatError(path, f"array {short(name)} is not as long as it says")
            places.append((begin, begin + info.file_size))
            spec = TensorSpec(name, header.dtype, header.shape)
            found[name] = StoredTensor(spec, path, begin + header.size, header.strides)
    if not ends_well(file, len(entries)):
        raise FileFormatError(path, "damaged: the end of the archive contradicts its directory")
    places.sort()
    if any(end > after for (_, end), (after, _) in pairwise(places)):
        raise FileFormatError(path, "damaged: two arrays share bytes")
    return found


CONTAINER: Final[Container] = _Npz()
