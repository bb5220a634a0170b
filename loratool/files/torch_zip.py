"""torch's zip archives, written without torch: a layout first, then the data in any order.

An archive holds a pickle that describes the tensors, a few short records, and the data of each
tensor, stored and aligned to 64 bytes. Where everything lies follows from names, dtypes and
shapes alone. So the data may be written straight to its place, by any number of threads, and
the frame around it (headers, CRC-32s, directory) afterwards, from what then stands in the file.
The result is, byte for byte, what ``torch.save`` writes for the same dictionary.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Final

from loratool.files.spec import TensorSpec
from loratool.files.torch_fingerprint import fingerprint
from loratool.files.torch_pickle import describe
from loratool.files.transfer import read_into, write_all

__all__ = ["TorchLayout", "archive_stem", "lay_out", "seal"]

ALIGNMENT: Final = 64
BLOCK: Final = 1 << 20
PORTION: Final = 8 << 20
U16: Final = (1 << 16) - 1
U32: Final = (1 << 32) - 1

LOCAL: Final = struct.Struct("<4s5H3I2H")
CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
END64: Final = struct.Struct("<4sQ2H2I4Q")
LOCATOR64: Final = struct.Struct("<4sIQI")
END: Final = struct.Struct("<4s4H2IH")
MADE_BY: Final = 0x031E  # Unix, version 3.0 of the format
NEEDED: Final = 45  # zip64 came with version 4.5

UTF8: Final = 1 << 11
CHECKED_BEHIND: Final = 1 << 3  # sizes and CRC-32 stand behind the data

FINGERPRINT: Final = ".data/serialization_id"
FINGERPRINT_DIGITS: Final = 40


@dataclass(frozen=True, slots=True)
class _Record:
    """An entry of the archive.

    Attributes:
        path: Its name there, with the archive's.
        size: Number of bytes that it holds.
        offset: Where its header begins.
        content: The bytes, or ``None`` for the data of a tensor and for the fingerprint.
    """

    path: bytes
    size: int
    offset: int
    content: bytes | None

    @property
    def begin(self) -> int:
        """Where its data begin."""
        bare = self.offset + LOCAL.size + len(self.path) + len(self._extra(0)) + 4
        return bare + -bare % ALIGNMENT

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.begin + self.size + len(self.behind(0))

    @property
    def flags(self) -> int:
        return UTF8 | (CHECKED_BEHIND if self.size else 0)

    def _extra(self, packed: int) -> bytes:
        """Return the zip64 field, if size or offset need one; ``packed`` is the size as stored."""
        values: list[int] = []
        if self.size >= U32:
            values += [self.size, packed]
        if self.offset >= U32:
            values.append(self.offset)
        return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""

    def header(self) -> bytes:
        """Return what stands before the data: header, name and padding."""
        extra = self._extra(0)
        start = self.offset + LOCAL.size + len(self.path) + len(extra)
        padding = self.begin - start - 4
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        head = LOCAL.pack(
            b"PK\3\4", 0, self.flags, 0, 0, 0, 0, 0, 0, len(self.path), len(extra)
        )  # fmt: skip
        return head + self.path + extra

    def behind(self, checksum: int) -> bytes:
        """Return what stands behind the data: nothing if there are none."""
        if not self.size:
            return b""
        sizes = "2Q" if self._extra(0) else "2I"
        return struct.pack(f"<4sI{sizes}", b"PK\7\x08", checksum, self.size, self.size)

    def entry(self, checksum: int) -> bytes:
        """Return its entry in the directory."""
        extra = self._extra(self.size)
        size = min(self.size, U32)
        head = CENTRAL.pack(
            b"PK\1\2", 0, 0, self.flags, 0, 0, 0, checksum, size, size,
            len(self.path), len(extra), 0, 0, 0, 0, min(self.offset, U32),
        )  # fmt: skip
        return head + self.path + extra


@dataclass(frozen=True, slots=True)
class TorchLayout:
    """Where everything lies in an archive.

    Attributes:
        specs: The tensors, in the order of the dictionary.
        offsets: Where the data of each tensor begin, by name; contiguous, little-endian.
        size: Size of the whole file in bytes.
        records: All entries, in the order of the file.
        prefix: The archive's own name and a slash.
    """

    specs: tuple[TensorSpec, ...]
    offsets: Mapping[str, int]
    size: int
    records: tuple[_Record, ...]
    prefix: bytes

    def frame(self, checksums: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield all of the file that is not data of tensors, as offsets and bytes.

        Args:
            checksums: CRC-32 of the data of each tensor, in the order of ``specs``.
        """
        waiting = iter(checksums)
        directory = bytearray()
        names: list[str] = []
        held: list[int] = []
        begin, gap = 0, bytearray()
        for record in self.records:
            gap += record.header()
            name = record.path.removeprefix(self.prefix).decode()
            content = record.content
            if name == FINGERPRINT:
                content = fingerprint(names, held).encode()
            if content is None:
                checksum = next(waiting)
                if record.size:
                    yield begin, bytes(gap)
                    begin, gap = record.begin + record.size, bytearray()
            else:
                checksum = zlib.crc32(content)
                gap += content
            gap += record.behind(checksum)
            directory += record.entry(checksum)
            names.append(name)
            held += [checksum] if record.size else []
        yield begin, bytes(gap)
        start = self.records[-1].end
        yield start, bytes(directory) + _ending(start, len(directory), len(self.records))


def archive_stem(path: PurePath) -> str:
    """Return the name that an archive called ``path`` has in itself: the file's, or ``archive``.

    ``torch.save`` takes the file's name without its last suffix where the whole path is ASCII.
    Here only the file's own name counts, so that a file does not depend on its folder.
    """
    stem = path.name.replace("\\", "/").rpartition("/")[2]
    stem = stem.rpartition(".")[0] if "." in stem else stem
    return stem if stem and path.name.isascii() else "archive"


def lay_out(specs: Sequence[TensorSpec], stem: str) -> TorchLayout:
    """Find out where everything lies in the archive of a dictionary of ``specs``.

    Args:
        specs: The tensors, in the order of the dictionary; contiguous, each with its own data.
        stem: The archive's own name, ``archive_stem`` of the file.

    Raises:
        UnsupportedError: torch has no such dtype.
        ValueError: Two tensors have one name, or the archive has no name.
    """
    if not stem or "/" in stem:
        raise ValueError(f"an archive cannot be called {stem!r}")
    prefix = f"{stem}/".encode()
    records: list[_Record] = []

    def add(name: str, content: bytes | None, size: int) -> _Record:
        offset = records[-1].end if records else 0
        records.append(_Record(prefix + name.encode(), size, offset, content))
        return records[-1]

    def add_plain(name: str, content: bytes) -> None:
        add(name, content, len(content))

    add_plain("data.pkl", describe(specs))
    add_plain(".format_version", b"1")
    add_plain(".storage_alignment", b"%d" % ALIGNMENT)
    add_plain("byteorder", b"little")
    offsets = {
        spec.name: add(f"data/{number}", None, spec.nbytes).begin
        for number, spec in enumerate(specs)
    }
    if len(offsets) != len(specs):
        raise ValueError("two tensors have the same name")
    add_plain("version", b"3\n")
    last = add(FINGERPRINT, None, FINGERPRINT_DIGITS)
    directory = sum(len(record.entry(0)) for record in records)
    size = last.end + directory + len(_ending(last.end, directory, len(records)))
    return TorchLayout(tuple(specs), MappingProxyType(offsets), size, tuple(records), prefix)


def _ending(start: int, length: int, count: int) -> bytes:
    """Return what closes an archive of ``count`` records whose directory begins at ``start``."""
    few, short = min(count, U16), min(length, U32)
    return (
        END64.pack(b"PK\6\6", END64.size - 12, MADE_BY, NEEDED, 0, 0, count, count, length, start)
        + LOCATOR64.pack(b"PK\6\7", 0, start + length, 1)
        + END.pack(b"PK\5\6", 0, 0, few, few, short, min(start, U32), 0)
    )


def seal(descriptor: int, layout: TorchLayout, *, path: Path, threads: int = 1) -> None:
    """Write the frame around data that already stand at their places.

    The data are read back, 1 MiB at a time, for their CRC-32s.

    Args:
        descriptor: The file, open for reading and writing.
        layout: Where everything lies.
        path: The file's name, for messages.
        threads: How many threads read.

    Raises:
        FileFormatError: The file is shorter than its layout.
        OSError: Writing failed.
    """

    def checksums(portion: list[TensorSpec]) -> list[int]:
        buffer = memoryview(bytearray(min(BLOCK, max(spec.nbytes for spec in portion))))
        return [
            _checksum(descriptor, layout.offsets[spec.name], spec.nbytes, buffer, path)
            for spec in portion
        ]

    with ThreadPoolExecutor(threads) as pool:
        found = list(chain.from_iterable(pool.map(checksums, _portions(layout.specs))))
    for offset, data in layout.frame(found):
        write_all(descriptor, memoryview(data), offset)


def _portions(specs: Sequence[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Yield runs of tensors that are long enough to be worth a thread's while."""
    portion: list[TensorSpec] = []
    length = 0
    for spec in specs:
        portion.append(spec)
        length += spec.nbytes
        if length >= PORTION:
            yield portion
            portion, length = [], 0
    if portion:
        yield portion


def _checksum(descriptor: int, offset: int, size: int, buffer: memoryview, path: Path) -> int:
    result = 0
    for start in range(0, size, BLOCK):
        view = buffer[: min(BLOCK, size - start)]
        read_into(descriptor, view, offset + start, path=path)
        result = zlib.crc32(view, result)
    return result
