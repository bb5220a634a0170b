"""Torch pickles made by hand, opcode by opcode."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

LEGACY_HEAD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."


def text(value: str) -> bytes:
    """Push a text."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """Push an integer."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def sequence(*parts: bytes) -> bytes:
    """Push a tuple."""
    return b"(" + b"".join(parts) + b"t"


def named(module: str, name: str) -> bytes:
    """Push something that is named."""
    return f"c{module}\n{name}\n".encode()


def storage(
    key: bytes = text("0"), size: int = 16, kind: bytes | None = None, *more: bytes
) -> bytes:
    """Push a storage of float32, or of another kind."""
    kind = kind or named("torch", "FloatStorage")
    return sequence(text("storage"), kind, key, text("cpu"), number(size), *more) + b"Q"


def tensor(
    of: bytes, shape: tuple[int, ...] = (4, 4), strides: tuple[int, ...] = (4, 1), offset: int = 0
) -> bytes:
    """Push a tensor."""
    views = (sequence(*map(number, sizes)) for sizes in (shape, strides))
    hooks = b"\x89" + named("collections", "OrderedDict") + b")R"
    arguments = sequence(of, number(offset), *views, hooks)
    return named("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def laughs(depth: int = 60) -> bytes:
    """Push a tuple that holds the one before it twice: two to the power of ``depth`` leaves."""
    out = text("ha")
    for level in range(depth):
        slot = struct.pack("<I", 1000 + level)
        out += b"r" + slot + b"j" + slot + b"\x86"
    return out


def dictionary(*items: bytes) -> bytes:
    """Return the pickle of a dictionary of keys and values in turn."""
    return b"\x80\x02}(" + b"".join(items) + b"u."


def zipped(
    path: Path, pickled: bytes, sizes: Mapping[str, int] | None = None, **records: bytes
) -> Path:
    """Write an archive as torch does, with storages of so many bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, size in (sizes or {"0": 64}).items():
            archive.writestr(f"archive/data/{key}", bytes(size))
        archive.writestr("archive/version", b"3\n")
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return path


def legacy(path: Path, pickled: bytes, keys: bytes, *storages: bytes) -> Path:
    """Write a file of torch's older format."""
    data = b"".join(struct.pack("<q", len(each) // 4) + each for each in storages)
    path.write_bytes(LEGACY_HEAD + pickled + keys + data)
    return path
