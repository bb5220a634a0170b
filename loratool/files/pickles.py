"""Torch pickles (``.bin``, ``.pt``, ``.pth``) read as data: nothing in them is ever executed.

A checkpoint written by ``torch.save`` is a small pickle that describes tensors, and their bytes
beside it. The description needs two dozen opcodes. They are interpreted here on plain values;
the few functions that torch's own checkpoints name are recognised by name and stand for the
record they would build. Any other name is refused. This is stricter than torch's weights-only
loader, needs no torch, reads no tensor data, and tells where in the file each tensor lies.

Both containers are read: the zip archive of torch 1.6 and later (stored, not compressed), and
the older sequence of pickles.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from loratool.errors import FileFormatError
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import Stamp, stamp_of
from loratool.files.json import LFS_PREFIX
from loratool.files.pickle_machine import PickledDict, PickledTensor, Storage, interpret
from loratool.files.spec import StoredTensor, TensorSpec

__all__ = ["TorchPickle", "other_contents", "read_pickle"]

MAX_PICKLE_BYTES: Final = 16 << 20
MAX_DEPTH: Final = 8
MAX_ENTRIES: Final = 200_000
LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True, slots=True)
class TorchPickle:
    """A pickled checkpoint whose description has been read; no tensor data has.

    Attributes:
        path: The file.
        tensors: By name; nested dictionaries are joined with dots.
        metadata: Empty; pickles have none.
        other: What else the file holds (``epoch``, ``optimizer``, …): name to a short text.
        size: Size of the file in bytes.
        stamp: What the file was when it was read.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    other: Mapping[str, str]
    size: int
    stamp: Stamp


def read_pickle(path: Path) -> TorchPickle:
    """Read the description of a file written by ``torch.save``.

    Raises:
        FileFormatError: Not such a file, damaged, or it names something that would be executed.
    """
    try:
        with path.open("rb") as file:
            stamp = stamp_of(file.fileno())
            size = stamp.size
            start = file.read(64)
            file.seek(0)
            if start.startswith(b"PK\x03\x04"):
                value, places = _read_zip(path, file)
            elif start.startswith(b"\x80"):
                value, places = _read_legacy(path, file)
            else:
                raise FileFormatError(path, _not_a_pickle(start, size))
    except OSError as error:
        raise FileFormatError(path, f"cannot be read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, struct.error, zlib.error, EOFError, RuntimeError) as error:
        # RuntimeError covers encrypted entries, unknown compression and endless recursion.
        raise FileFormatError(path, f"damaged or truncated: {error}") from None
    except ValueError as error:
        raise FileFormatError(path, f"damaged: {error}") from None
    tensors, other = _Collector(path, places).collect(value)
    for stored in tensors.values():
        if stored.offset + stored.span > size:
            raise FileFormatError(path, f"truncated: tensor {stored.spec.name!r} ends beyond it")
    return TorchPickle(path, tensors, {}, other, size, stamp)


def _not_a_pickle(start: bytes, size: int) -> str:
    if start.startswith(LFS_PREFIX):
        return "a git-LFS pointer, not the weights; fetch them with 'git lfs pull'"
    if size == 0:
        return "the file is empty"
    if start[8:9] == b"{":
        return "a safetensors file, not a torch pickle; rename it to .safetensors"
    return "not a file written by torch.save"


def _read_zip(path: Path, file: IO[bytes]) -> tuple[Any, dict[str, int]]:
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        root = next((name for name in entries if name.split("/", 1)[-1] == "data.pkl"), None)
        if root is None:
            raise FileFormatError(path, "a zip archive, but not one written by torch.save")
        prefix = root.removesuffix("data.pkl")
        order = entries.get(f"{prefix}byteorder")
        if order is not None and _entry(path, archive, order, 16).strip() == b"big":
            raise FileFormatError(path, "its tensors are big-endian, which is not supported")
        value = interpret(path, io.BytesIO(_entry(path, archive, entries[root], MAX_PICKLE_BYTES)))

        def place(storage: Storage) -> int:
            info = entries.get(f"{prefix}data/{storage.key}")
            width = DTYPES[storage.dtype].bits // 8
            if info is None or info.compress_type != zipfile.ZIP_STORED:
                raise FileFormatError(path, f"storage {storage.key!r} is missing or compressed")
            if info.file_size < storage.elements * width:
                raise FileFormatError(path, f"storage {storage.key!r} is shorter than it claims")
            # The local header repeats the name and has an extra field of its own length.
            file.seek(info.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            return int(info.header_offset + 30 + name_length + extra_length)

        return value, {storage.key: place(storage) for storage in _storages(value)}


def _entry(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """Read an entry that torch stores uncompressed, if it is not larger than ``limit``."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
        raise FileFormatError(path, f"entry {info.filename!r} is compressed or too large")
    return archive.read(info)


def _read_legacy(path: Path, file: IO[bytes]) -> tuple[Any, dict[str, int]]:
    data = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    if interpret(path, data) != LEGACY_MAGIC:
        raise FileFormatError(path, "a pickle, but not a checkpoint written by torch.save")
    _version, system, value, keys = (interpret(path, data) for _ in range(4))
    used = data.tell()
    if isinstance(system, PickledDict) and system.items.get("little_endian") is False:
        raise FileFormatError(path, "its tensors are big-endian, which is not supported")
    if not isinstance(keys, list):
        raise FileFormatError(path, "damaged: it has no list of storages")
    storages = {storage.key: storage for storage in _storages(value)}
    places: dict[str, int] = {}
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise FileFormatError(path, f"damaged: storage {key!r} belongs to no tensor")
        file.seek(used)
        (elements,) = struct.unpack("<q", file.read(8))
        if elements < storage.elements:
            raise FileFormatError(path, f"storage {key!r} is shorter than it claims")
        places[key] = used + 8
        used += 8 + elements * (DTYPES[storage.dtype].bits // 8)

    return value, places


def _storages(value: Any) -> list[Storage]:
    """Return every storage that occurs in ``value``, looking into each container once."""
    found: dict[str, Storage] = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, PickledTensor):
            largest = found.get(item.storage.key, item.storage)
            if item.storage.elements >= largest.elements:
                found[item.storage.key] = item.storage
        elif isinstance(item, PickledDict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.items.values() if isinstance(item, PickledDict) else item
    return list(found.values())


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return math.prod(shape) == 0 or all(
        size == 1 or stride == expected
        for size, stride, expected in zip(shape, strides, _contiguous(shape), strict=True)
    )


class _Collector:
    """Flattens the unpickled value into named tensors and a summary of everything else."""

    def __init__(self, path: Path, places: Mapping[str, int]) -> None:
        self.path = path
        self.places = places
        self.tensors: dict[str, StoredTensor] = {}
        self.other: dict[str, str] = {}
        self.owners: dict[tuple[Any, ...], str] = {}
        self.visited = 0

    def collect(self, value: Any) -> tuple[dict[str, StoredTensor], dict[str, str]]:
        """Return tensors and the rest by name; nested containers are joined with dots."""
        if isinstance(value, list):
            value = PickledDict(dict(enumerate(value)))
        if not isinstance(value, PickledDict):
            raise FileFormatError(self.path, "holds no dictionary of tensors")
        items = value.items
        wrapped = [
            key for key in ("state_dict", "model") if isinstance(items.get(key), PickledDict)
        ]
        if wrapped and not any(isinstance(item, PickledTensor) for item in items.values()):
            self._visit("", items[wrapped[0]].items, 0)
            self.other |= {
                str(key): type(item).__name__ for key, item in items.items() if key != wrapped[0]
            }
        else:
            self._visit("", items, 0)
        return self.tensors, self.other

    def _visit(self, prefix: str, items: Mapping[Any, Any], depth: int) -> None:
        for key, item in items.items():
            self.visited += 1
            if self.visited > MAX_ENTRIES:
                raise FileFormatError(self.path, "has too many entries to be a checkpoint")
            name = f"{prefix}{_summary(key)}"
            if isinstance(item, PickledTensor):
                if name in self.tensors:
                    raise FileFormatError(self.path, f"two tensors are called {name!r}")
                self.tensors[name] = self._stored(name, item)
            elif isinstance(item, PickledDict) and depth < MAX_DEPTH:
                self._visit(f"{name}.", item.items, depth + 1)
            elif isinstance(item, list | tuple) and any(
                isinstance(part, PickledTensor) for part in item
            ):
                self._visit(f"{name}.", dict(enumerate(item)), depth + 1)
            else:
                self.other[name] = _summary(item)[:200]

    def _stored(self, name: str, tensor: PickledTensor) -> StoredTensor:
        spec = TensorSpec(name, tensor.dtype, tensor.shape)
        width = DTYPES[spec.dtype].bits // 8
        strides = None if _is_contiguous(tensor.shape, tensor.strides) else tensor.strides
        if tensor.storage.key not in self.places:
            raise FileFormatError(self.path, f"storage {tensor.storage.key!r} is missing")
        offset = self.places[tensor.storage.key] + tensor.offset * width
        identity = (spec.dtype, tensor.storage.key, tensor.offset, tensor.shape, tensor.strides)
        owner = self.owners.setdefault(identity, name) if spec.elements else name
        stored = StoredTensor(spec, self.path, offset, strides, owner if owner != name else None)
        held = tensor.storage.elements * (DTYPES[tensor.storage.dtype].bits // 8)
        if stored.span > max(0, held - tensor.offset * width):
            raise FileFormatError(self.path, f"tensor {name!r} reaches beyond its storage")
        return stored


def other_contents(file: TorchPickle) -> tuple[str, ...]:
    """Return a sentence on what a pickle holds beside its tensors, if anything."""
    if not file.other:
        return ()
    names = ", ".join(list(file.other)[:4])
    return (f"{file.path.name} holds {len(file.other)} more entries, not used: {names}",)


def _summary(value: Any) -> str:
    """Return a plain value as text, and the kind of anything that may be large or nested."""
    is_small = isinstance(value, str | float | None) or (
        isinstance(value, int) and abs(value) < 1 << 64
    )
    return str(value) if is_small else type(value).__name__
