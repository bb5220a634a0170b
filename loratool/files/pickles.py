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
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from loratool.errors import FileFormatError, unreadable
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import Stamp, stamp_of
from loratool.files.json import LFS_PREFIX
from loratool.files.pickle_machine import PickledDict, PickledTensor, Storage, interpret
from loratool.files.sources import opened
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.files.zip_entries import (
    FLAGS,
    FOLDER,
    UTF8,
    begin_of,
    check_stored,
    ends_well,
    short,
)

__all__ = ["WRAPPERS", "TorchPickle", "other_contents", "read_pickle", "tensor_in"]

WRAPPERS: Final = (
    "lora_state_dict",
    "adapter_state_dict",
    "lora_weights",
    "lora_params",
    "lora",
    "adapter",
    "adapters",
    "loras",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "weights",
    "params",
)
"""What trainers keep the tensors under, what is an adapter's alone first."""
NUMBER: Final = re.compile(r"\d+(\.\d+)?", re.ASCII)
MAX_PICKLE_BYTES: Final = 16 << 20
MAX_DEPTH: Final = 8
MAX_ENTRIES: Final = 200_000
MAX_NAME: Final = 4096
MAX_LETTERS: Final = 32 << 20
LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
LEGACY_VERSION: Final = 1001
VERSIONS: Final = range(1, 11)


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
        groups: The dictionaries that hold all tensors, by name, where no tensor lies beside them.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    other: Mapping[str, str]
    size: int
    stamp: Stamp
    groups: tuple[str, ...] = ()


def read_pickle(path: Path) -> TorchPickle:
    """Read the description of a file written by ``torch.save``.

    Raises:
        FileFormatError: Not such a file, damaged, or it names something that would be executed.
    """
    try:
        with opened(path) as file:
            stamp = stamp_of(file)
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
        raise unreadable(path, error) from None
    except (zipfile.BadZipFile, struct.error, zlib.error, EOFError, RuntimeError) as error:
        # RuntimeError covers encrypted entries, unknown compression and endless recursion.
        raise FileFormatError(path, f"damaged or truncated: {error}") from None
    except ValueError as error:
        raise FileFormatError(path, f"damaged: {error}") from None
    collector = _Collector(path, places)
    tensors, other = collector.collect(value)
    for stored in tensors.values():
        if stored.offset + stored.span > size:
            raise FileFormatError(path, f"truncated: tensor {stored.spec.name!r} ends beyond it")
    return TorchPickle(path, tensors, {}, other, size, stamp, collector.groups)


def tensor_in(path: Path, file: IO[bytes], name: str) -> StoredTensor:
    """Return the one tensor that an archive of ``torch.save`` holds, where it lies in ``file``.

    Args:
        path: The file, for messages.
        file: The archive.
        name: What the tensor is called.

    Raises:
        FileFormatError: It is no such archive, or holds something else.
    """
    try:
        value, places = _read_zip(path, file)
        if not isinstance(value, PickledTensor):
            raise FileFormatError(path, f"holds something else where {name!r} should be")
        found = _Collector(path, places).collect(PickledDict({name: value}))[0][name]
        size = file.seek(0, io.SEEK_END)
    except (zipfile.BadZipFile, struct.error, zlib.error, EOFError, RuntimeError) as error:
        raise FileFormatError(path, f"damaged or truncated at {name!r}: {error}") from None
    except (OSError, ValueError) as error:
        raise FileFormatError(path, f"damaged at {name!r}: {error}") from None
    if found.offset + found.span > size:
        raise FileFormatError(path, f"truncated: tensor {name!r} ends beyond its archive")
    return found


def _not_a_pickle(start: bytes, size: int) -> str:
    if start.startswith(LFS_PREFIX):
        return "a git-LFS pointer, not the weights; fetch them with 'git lfs pull'"
    if size == 0:
        return "the file is empty"
    if start[8:9] == b"{":
        return "a safetensors file, not a torch pickle; rename it to .safetensors"
    return "not a file written by torch.save"


def _read_zip(path: Path, file: IO[bytes]) -> tuple[Any, dict[str, int]]:
    """Read an archive as torch finds things in it: below the folder of its first entry."""
    with zipfile.ZipFile(file) as archive:
        entries = _directory(path, file, archive)
        roots = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        first = _first_folder(entries)
        if f"{first}/data.pkl" not in roots:
            raise FileFormatError(path, "a zip archive, but not one written by torch.save")
        if len(roots) > 1:
            raise FileFormatError(path, f"damaged: it holds {len(roots)} descriptions (data.pkl)")

        def read(name: str, limit: int) -> bytes | None:
            info = entries.get(f"{first}/{name}")
            return _entry(path, archive, info, limit) if info is not None else None

        _check_version(path, read("version", 16) or read(".data/version", 16))
        for name in (".data/serialization_id", ".storage_alignment"):
            if not (read(name, 64) or b"0").isdigit():
                raise FileFormatError(path, f"damaged: its record {name} is no number")
        order = read("byteorder", 16)
        if order == b"big":
            raise FileFormatError(path, "its tensors are big-endian, which is not supported")
        if order not in (None, b"little"):
            raise FileFormatError(path, f"has an unknown order of bytes, {order!r}")
        value, storages = interpret(path, io.BytesIO(read("data.pkl", MAX_PICKLE_BYTES) or b""))

        def place(storage: Storage) -> int:
            info = entries.get(_lower(f"{first}/data/{storage.key}"))
            if info is None:
                raise FileFormatError(path, f"storage {short(storage.key)} is missing")
            check_stored(path, info)
            held = DTYPES[storage.dtype].size(storage.elements)
            if info.file_size != held:
                word = "shorter" if info.file_size < held else "longer"
                raise FileFormatError(path, f"storage {short(storage.key)} is {word} than claimed")
            return begin_of(path, file, info)

        return value, {key: place(storage) for key, storage in storages.items()}


def _lower(name: str) -> str:
    """Return a name in lower case as torch's reader has it, which knows ASCII only."""
    return name.lower() if name.isascii() else name


def _first_folder(entries: Mapping[str, zipfile.ZipInfo]) -> str:
    return next(iter(entries), "").partition("/")[0]


def _directory(path: Path, file: IO[bytes], archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by their names in lower case, as torch's reader looks them up.

    Raises:
        FileFormatError: Two readers could see two archives in it.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if entries.setdefault(_lower(info.filename), info) is not info:
            raise FileFormatError(path, f"damaged: {short(info.filename)} is in it twice")
        is_named = info.filename == info.orig_filename and (
            info.filename.isascii() or info.flag_bits & UTF8
        )
        if not is_named or info.flag_bits & ~FLAGS or info.external_attr & FOLDER or info.volume:
            raise FileFormatError(path, f"damaged: entry {short(info.filename)} is no plain file")
        begin_of(path, file, info)
    names = [info.filename for info in entries.values()]
    first = f"{names[0].partition('/')[0]}/" if names else ""
    if not all(name.startswith(first) for name in names):
        raise FileFormatError(path, "a zip archive of several folders, not torch's")
    if f"{_lower(first)}constants.pkl" in entries:
        raise FileFormatError(path, "a TorchScript archive, which holds a program")
    if not ends_well(file, len(entries)):
        raise FileFormatError(path, "damaged: the end of the archive contradicts its directory")
    return entries


def _check_version(path: Path, text: bytes | None) -> None:
    if text is None or not text.strip().isdigit() or int(text) not in VERSIONS:
        raise FileFormatError(path, f"its version of torch's format is unknown: {text!r}")


def _entry(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """Read an entry that torch stores uncompressed, if it is not larger than ``limit``."""
    check_stored(path, info)
    if info.file_size > limit:
        raise FileFormatError(path, f"entry {short(info.filename)} is too large")
    return archive.read(info)


def _read_legacy(path: Path, file: IO[bytes]) -> tuple[Any, dict[str, int]]:
    data = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    magic, _ = interpret(path, data)
    if type(magic) is not int or magic != LEGACY_MAGIC:
        raise FileFormatError(path, "a pickle, but not a checkpoint written by torch.save")
    version, _ = interpret(path, data)
    if type(version) is not int or version != LEGACY_VERSION:
        raise FileFormatError(path, "its version of torch's older format is unknown")
    system, _ = interpret(path, data)
    if isinstance(system, PickledDict) and system.items.get("little_endian") is False:
        raise FileFormatError(path, "its tensors are big-endian, which is not supported")
    value, storages = interpret(path, data, has_views=True)
    keys, _ = interpret(path, data)
    used = data.tell()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise FileFormatError(path, "damaged: it has no list of storages")
    if len(set(keys)) != len(keys):
        raise FileFormatError(path, "damaged: it lists a storage twice")
    places: dict[str, int] = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None:
            raise FileFormatError(path, f"damaged: storage {short(key)} belongs to no tensor")
        file.seek(used)
        (elements,) = struct.unpack("<q", file.read(8))
        if elements != storage.elements:
            word = "shorter" if elements < storage.elements else "longer"
            raise FileFormatError(path, f"storage {short(key)} is {word} than claimed")
        places[key] = used + 8
        used += 8 + DTYPES[storage.dtype].size(elements)
    missing = next((key for key in storages if key not in places), None)
    if missing is not None:
        raise FileFormatError(path, f"storage {short(missing)} is missing")
    return value, places


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
        self.visited = self.letters = 0
        self.inside: set[int] = set()
        self.with_tensors: dict[int, bool] = {}
        self.groups: tuple[str, ...] = ()

    def collect(self, value: Any) -> tuple[dict[str, StoredTensor], dict[str, str]]:
        """Return tensors and the rest by name; nested containers are joined with dots."""
        if isinstance(value, list):
            value = PickledDict(dict(enumerate(value)))
        if not isinstance(value, PickledDict):
            raise FileFormatError(self.path, "holds no dictionary of tensors")
        items = value.items
        wrapped = [key for key in WRAPPERS if isinstance(items.get(key), PickledDict)]
        if wrapped and not any(isinstance(item, PickledTensor) for item in items.values()):
            inner = items[wrapped[0]].items
            self._visit("", inner, 0)
            self._group(inner)
            self.other |= {
                str(key): _summary(item)[:200] for key, item in items.items() if key != wrapped[0]
            }
        else:
            self._visit("", items, 0)
            self._group(items)
        return self.tensors, self.other

    def _group(self, items: Mapping[Any, Any]) -> None:
        """Remember the dictionaries among ``items``, where no tensor lies beside them."""
        if not any(isinstance(item, PickledTensor) for item in items.values()):
            named = (key for key, item in items.items() if isinstance(item, PickledDict))
            self.groups = tuple(key for key in named if isinstance(key, str) and key)

    def _visit(self, prefix: str, items: Mapping[Any, Any], depth: int) -> None:
        for key, item in items.items():
            self.visited += 1
            if self.visited > MAX_ENTRIES:
                raise FileFormatError(self.path, "has too many entries to be a checkpoint")
            name = f"{prefix}{_summary(key)}"
            self.letters += len(name)
            if len(name) > MAX_NAME or self.letters > MAX_LETTERS:
                raise FileFormatError(self.path, "has names too long to be a checkpoint's")
            if isinstance(item, PickledTensor):
                if name in self.tensors:
                    raise FileFormatError(self.path, f"two tensors are called {name!r}")
                self.tensors[name] = self._stored(name, item)
            elif isinstance(item, PickledDict) and depth < MAX_DEPTH:
                self._enter(name, item, item.items, depth)
            elif isinstance(item, list | tuple) and self._has_tensors(item) and depth < MAX_DEPTH:
                self._enter(name, item, dict(enumerate(item)), depth)
            else:
                self.other[name] = _summary(item)[:200]

    def _enter(self, name: str, container: Any, items: Mapping[Any, Any], depth: int) -> None:
        if id(container) in self.inside:
            raise FileFormatError(self.path, f"{short(name)} holds itself")
        self.inside.add(id(container))
        self._visit(f"{name}.", items, depth + 1)
        self.inside.remove(id(container))

    def _has_tensors(self, items: list[Any] | tuple[Any, ...]) -> bool:
        """Whether there are tensors among them; each container is looked through once."""
        if id(items) not in self.with_tensors:
            is_so = any(isinstance(part, PickledTensor) for part in items)
            self.with_tensors[id(items)] = is_so
        return self.with_tensors[id(items)]

    def _stored(self, name: str, tensor: PickledTensor) -> StoredTensor:
        spec = TensorSpec(name, tensor.dtype, tensor.shape)
        width = DTYPES[spec.dtype].size(1)
        strides = None if _is_contiguous(tensor.shape, tensor.strides) else tensor.strides
        if tensor.storage.key not in self.places:
            raise FileFormatError(self.path, f"storage {tensor.storage.key!r} is missing")
        offset = self.places[tensor.storage.key] + tensor.offset * width
        identity = (spec.dtype, tensor.storage.key, tensor.offset, tensor.shape, tensor.strides)
        owner = self.owners.setdefault(identity, name) if spec.elements else name
        stored = StoredTensor(spec, self.path, offset, strides, owner if owner != name else None)
        held = DTYPES[tensor.storage.dtype].size(tensor.storage.elements)
        if stored.span > max(0, held - tensor.offset * width):
            raise FileFormatError(self.path, f"tensor {name!r} reaches beyond its storage")
        return stored


def other_contents(file: TorchPickle) -> tuple[str, ...]:
    """Return a sentence on what a pickle holds beside its tensors, if anything."""
    if not file.other:
        return ()
    names = ", ".join(list(file.other)[:4])
    said = [f"{file.path.name} holds {len(file.other)} more entries, not used: {names}"]
    for name in ("alpha", "lora_alpha"):
        value = file.other.get(name, "")
        if NUMBER.fullmatch(value):
            said.append(f"its {name} is {value}: if that is the adapter's, --alpha {value} uses it")
    return tuple(said)


def _summary(value: Any) -> str:
    """Return a plain value as text, and the kind of anything that may be large or nested."""
    is_small = isinstance(value, str | float | None) or (
        isinstance(value, int) and abs(value) < 1 << 64
    )
    return str(value) if is_small else type(value).__name__
