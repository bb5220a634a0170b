"""Entries of zip archives: where their data lie, and whether an archive is what it seems.

Of a file that comes from a stranger two readers could see two archives: what the directory, the
headers of entries and the records at the end say has to agree.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from loratool.errors import FileFormatError, unreadable
from loratool.files.inputs import Stamp, stamp_of
from loratool.files.sources import opened

__all__ = [
    "FLAGS",
    "FOLDER",
    "UTF8",
    "DeflatedEntry",
    "begin_of",
    "check_stored",
    "ends_well",
    "is_deflated",
    "short",
]

FLAGS: Final = 0x808
"""Bits that an entry may have: sizes follow the data, the name is UTF-8."""
FOLDER: Final = 0x10
END: Final = struct.Struct("<4sHHHHIIH")
LONG_END: Final = struct.Struct("<4sQ4xIIQQQQ")
LOCATOR: Final = struct.Struct("<4sIQI")
LOCAL: Final = struct.Struct("<4s2xHH16xHH")
"""Of the Zip File Format Specification (APPNOTE) 4.3: its records 4.3.16, 14, 15 and 7."""
LONG: Final = 0xFFFF
LONGER: Final = 0xFFFFFFFF
"""Both stand for numbers that a longer record holds."""
UTF8: Final = 0x800
BLOCK: Final = 1 << 20
MOST: Final = 1 << 30
"""Bytes that an entry may become."""
EXPANSION: Final = 1100
"""A little more than DEFLATE can do, which zeros come near."""
LONGEST: Final = 200
"""How much of a name is shown."""


def ends_well(file: IO[bytes], count: int) -> bool:
    """Whether what follows the directory says of it what it is, the longer record too if any."""
    size = file.seek(-END.size, io.SEEK_END)
    signature, disk, start, here, total, length, offset, comment = END.unpack(file.read(END.size))
    if signature != b"PK\x05\x06" or comment or disk != start or disk not in (0, LONG):
        return False
    brief = (here, total, length, offset)
    is_long = LONG in (here, total) or LONGER in (length, offset)
    if not is_long and size == offset + length:
        return bool(here == total == count)
    if size < LONG_END.size + LOCATOR.size:
        return False
    begin = size - LONG_END.size - LOCATOR.size
    file.seek(begin)
    signature, rest, disk, start, here, total, length, offset = LONG_END.unpack(
        file.read(LONG_END.size)
    )
    locator = LOCATOR.unpack(file.read(LOCATOR.size))
    whole = (here, total, length, offset)
    return bool(
        (signature, rest, disk, start) == (b"PK\x06\x06", LONG_END.size - 12, 0, 0)
        and locator == (b"PK\x06\x07", 0, begin, 1)
        and here == total == count
        and offset + length == begin
        and all(a in (b, LONG, LONGER) for a, b in zip(brief, whole, strict=True))
    )


def begin_of(path: Path, file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Return where an entry's data begins: its local header repeats the name, and has an extra."""
    file.seek(info.header_offset)
    signature, flags, method, name_length, extra_length = LOCAL.unpack(file.read(LOCAL.size))
    if (signature, flags, method) != (
        b"PK\x03\x04",
        info.flag_bits,
        info.compress_type,
    ) or file.read(name_length) != _raw_name(info):
        raise FileFormatError(path, f"damaged: {short(info.filename)} is not where it is listed")
    return int(info.header_offset + 30 + name_length + extra_length)


def check_stored(path: Path, info: zipfile.ZipInfo) -> None:
    """Refuse an entry that is compressed.

    Raises:
        FileFormatError: It is.
    """
    is_plain = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    if not is_plain:
        raise FileFormatError(
            path,
            f"entry {short(info.filename)} is compressed",
            hint="write it without compression (numpy.savez, mx.savez, torch.save)",
        )


def is_deflated(path: Path, info: zipfile.ZipInfo) -> bool:
    """Whether an entry is compressed in the one way that is read.

    Raises:
        FileFormatError: It is larger than one is believed to be.
    """
    if info.compress_type != zipfile.ZIP_DEFLATED:
        return False
    if info.file_size > min(MOST, EXPANSION * info.compress_size + BLOCK):
        raise FileFormatError(
            path,
            f"entry {short(info.filename)} would become {info.file_size} bytes out of "
            f"{info.compress_size}, which is not believed",
            hint="write it without compression (numpy.savez, mx.savez)",
        )
    return True


@dataclass(frozen=True, slots=True)
class DeflatedEntry:
    """An entry that is compressed with DEFLATE.

    Attributes:
        path: The archive.
        name: The entry.
        begin: Where its data begin.
        packed: Bytes there.
        size: Bytes that they stand for.
        checksum: CRC-32 of these.
        skipped: How many of them are a header.
        stamp: What the archive was when it was first seen.
    """

    path: Path
    name: str
    begin: int
    packed: int
    size: int
    checksum: int
    skipped: int
    stamp: Stamp

    def read(self) -> bytes:
        """Return all but the header.

        Raises:
            FileFormatError: The archive has changed, or is damaged.
        """
        try:
            with opened(self.path) as file:
                if not stamp_of(file).fits(self.stamp):
                    raise FileFormatError(self.path, "was changed while it was read")
                file.seek(self.begin)
                found = self._unpacked(file)
        except OSError as error:
            raise unreadable(self.path, error) from None
        except zlib.error as error:
            raise FileFormatError(
                self.path, f"damaged: entry {short(self.name)} cannot be unpacked: {error}"
            ) from None
        return found[self.skipped :]

    def _unpacked(self, file: IO[bytes]) -> bytes:
        machine = zlib.decompressobj(-zlib.MAX_WBITS)
        found = bytearray()
        left = self.packed
        while left and not machine.eof:
            data = file.read(min(BLOCK, left))
            left -= len(data) or left
            # One byte more than there may be tells a longer one from a whole one.
            found += machine.decompress(data, self.size + 1 - len(found))
            if len(found) > self.size:
                break
        if len(found) != self.size or not machine.eof or zlib.crc32(found) != self.checksum:
            raise FileFormatError(
                self.path, f"damaged: entry {short(self.name)} is not what its directory says"
            )
        return bytes(found)


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    return info.orig_filename.encode("utf-8" if info.flag_bits & UTF8 else "cp437")


def short(name: str) -> str:
    """Return a name for messages, at most so long."""
    return repr(name if len(name) <= LONGEST else f"{name[:LONGEST]}…")
