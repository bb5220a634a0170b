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
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from loratool.errors import FileFormatError
from loratool.files.dtypes import DTYPES, dtype_named
from loratool.files.inputs import Stamp, stamp_of
from loratool.files.json import LFS_PREFIX
from loratool.files.spec import StoredTensor, TensorSpec

__all__ = ["TorchPickle", "read_pickle"]

MAX_PICKLE_BYTES: Final = 16 << 20
MAX_OPCODES: Final = 4_000_000
MAX_DEPTH: Final = 8
MAX_ENTRIES: Final = 200_000
MAX_DIMENSIONS: Final = 64
LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C

STORAGE_DTYPES: Final = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8",
}


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


@dataclass(frozen=True, slots=True)
class _Named:
    """A global that the pickle names: never imported, only compared."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    elements: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(slots=True)
class _Dict:
    """A dictionary under construction; keys of any hashable kind."""

    items: dict[Any, Any] = field(default_factory=dict)


class _Mark:
    """The place on the stack where a MARK opcode stood."""


_MARK: Final = _Mark()


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
        value = _interpret(path, io.BytesIO(_entry(path, archive, entries[root], MAX_PICKLE_BYTES)))

        def place(storage: _Storage) -> int:
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
    if _interpret(path, data) != LEGACY_MAGIC:
        raise FileFormatError(path, "a pickle, but not a checkpoint written by torch.save")
    _version, system, value, keys = (_interpret(path, data) for _ in range(4))
    used = data.tell()
    if isinstance(system, _Dict) and system.items.get("little_endian") is False:
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


def _storages(value: Any) -> list[_Storage]:
    """Return every storage that occurs in ``value``, looking into each container once."""
    found: dict[str, _Storage] = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, _Tensor):
            largest = found.get(item.storage.key, item.storage)
            if item.storage.elements >= largest.elements:
                found[item.storage.key] = item.storage
        elif isinstance(item, _Dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.items.values() if isinstance(item, _Dict) else item
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
            value = _Dict(dict(enumerate(value)))
        if not isinstance(value, _Dict):
            raise FileFormatError(self.path, "holds no dictionary of tensors")
        items = value.items
        wrapped = [key for key in ("state_dict", "model") if isinstance(items.get(key), _Dict)]
        if wrapped and not any(isinstance(item, _Tensor) for item in items.values()):
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
            if isinstance(item, _Tensor):
                if name in self.tensors:
                    raise FileFormatError(self.path, f"two tensors are called {name!r}")
                self.tensors[name] = self._stored(name, item)
            elif isinstance(item, _Dict) and depth < MAX_DEPTH:
                self._visit(f"{name}.", item.items, depth + 1)
            elif isinstance(item, list | tuple) and any(isinstance(part, _Tensor) for part in item):
                self._visit(f"{name}.", dict(enumerate(item)), depth + 1)
            else:
                self.other[name] = _summary(item)[:200]

    def _stored(self, name: str, tensor: _Tensor) -> StoredTensor:
        spec = TensorSpec(name, tensor.storage.dtype, tensor.shape)
        width = DTYPES[spec.dtype].bits // 8
        strides = None if _is_contiguous(tensor.shape, tensor.strides) else tensor.strides
        if tensor.storage.key not in self.places:
            raise FileFormatError(self.path, f"storage {tensor.storage.key!r} is missing")
        offset = self.places[tensor.storage.key] + tensor.offset * width
        identity = (tensor.storage.key, tensor.offset, tensor.shape, tensor.strides)
        owner = self.owners.setdefault(identity, name) if spec.elements else name
        stored = StoredTensor(spec, self.path, offset, strides, owner if owner != name else None)
        if stored.span > max(0, tensor.storage.elements - tensor.offset) * width:
            raise FileFormatError(self.path, f"tensor {name!r} reaches beyond its storage")
        return stored


def _summary(value: Any) -> str:
    """Return a plain value as text, and the kind of anything that may be large or nested."""
    is_small = isinstance(value, str | float | None) or (
        isinstance(value, int) and abs(value) < 1 << 64
    )
    return str(value) if is_small else type(value).__name__


def _rebuild(path: Path, named: _Named, arguments: tuple[Any, ...]) -> Any:
    """What calling ``named`` would build, for the few names that torch's checkpoints use."""
    match named.path:
        case "collections.OrderedDict":
            pairs = arguments[0] if arguments else ()
            return _Dict({_plain_key(key): value for key, value in pairs})
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor":
            return _tensor(path, arguments)
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
            return arguments[0]
        case "torch._tensor._rebuild_from_type_v2" if isinstance(arguments[0], _Named):
            return _rebuild(path, arguments[0], arguments[2])
        case "torch.Size" | "builtins.set" | "__builtin__.set" | "builtins.list":
            return arguments[0] if arguments else []
        case "torch.device":
            return "device"
        case "_codecs.encode":
            return arguments[0]
        case _:
            raise FileFormatError(
                path,
                f"its pickle would call {named.path!r}, which is not executed",
                hint="save the tensors alone, as safetensors, where you trust the file",
            )


def _tensor(path: Path, arguments: tuple[Any, ...]) -> _Tensor:
    storage, offset, shape, strides = arguments[:4]
    lazily = arguments[6] if len(arguments) > 6 else None
    if isinstance(lazily, _Dict) and any(lazily.items.values()):
        raise FileFormatError(path, "holds a tensor that is conjugated or negated lazily")
    if not isinstance(shape, tuple | list) or not isinstance(strides, tuple | list):
        raise FileFormatError(path, "damaged: a tensor has an impossible shape")
    sizes = [offset, *shape[: MAX_DIMENSIONS + 1], *strides[: MAX_DIMENSIONS + 1]]
    if (
        not isinstance(storage, _Storage)
        or len(shape) != len(strides)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size < 1 << 48 for size in sizes)
        or math.prod(shape) >= 1 << 62
    ):
        raise FileFormatError(path, "damaged: a tensor has an impossible shape")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _storage(path: Path, persistent: Any) -> _Storage:
    try:
        kind, named, key, _, elements, *_ = persistent
        dtype = STORAGE_DTYPES[named.name]
    except (TypeError, ValueError, KeyError, AttributeError):
        raise FileFormatError(path, "damaged: it names a storage of an unknown type") from None
    if kind != "storage" or type(elements) is not int or elements < 0:
        raise FileFormatError(path, "damaged: it names a storage of an unknown type")
    return _Storage(dtype, str(key), elements)


def _interpret(path: Path, data: IO[bytes]) -> Any:
    """Interpret the pickle that begins where ``data`` stands, and leave ``data`` behind it."""
    machine = _Machine(path)
    begin = data.tell()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > MAX_OPCODES:
                raise FileFormatError(path, "its description is too long to be a checkpoint's")
            if machine.step(opcode.name, argument):
                return machine.stack[-1]
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(
            path, f"damaged: its pickle breaks off {data.tell() - begin} bytes in: {error}"
        ) from None
    raise FileFormatError(path, "truncated: its pickle has no end")


class _Machine:
    """The pickle machine, on values that cannot do anything."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> bool:
        """Carry out one opcode; return whether it was the last."""
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = tuple(self.stack[len(self.stack) - count :])
            del self.stack[len(self.stack) - count :]
            self.stack.append(items)
        elif name == "STOP":
            return True
        else:
            handler = getattr(self, f"_{name.lower()}", None)
            if handler is None:
                raise FileFormatError(self.path, f"its pickle uses the opcode {name}")
            handler(argument)
        return False

    def _since_mark(self) -> list[Any]:
        index = len(self.stack) - 1
        while self.stack[index] is not _MARK:
            index -= 1
            if index < 0:
                raise ValueError("unbalanced mark")
        items = self.stack[index + 1 :]
        del self.stack[index:]
        return items

    def _proto(self, argument: Any) -> None: ...

    def _frame(self, argument: Any) -> None: ...

    def _mark(self, argument: Any) -> None:
        self.stack.append(_MARK)

    def _empty_dict(self, argument: Any) -> None:
        self.stack.append(_Dict())

    def _empty_list(self, argument: Any) -> None:
        self.stack.append([])

    def _empty_set(self, argument: Any) -> None:
        self.stack.append([])

    def _tuple(self, argument: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _put(self, argument: int) -> None:
        self.memo[argument] = self.stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, argument: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _get(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    _binget = _long_binget = _get

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_named(module, name)

    def _stack_global(self, argument: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._push_named(module, name)

    def _push_named(self, module: str, name: str) -> None:
        dtype = dtype_named(name) if module == "torch" else None
        self.stack.append(dtype.name if dtype else _Named(module, name))

    def _reduce(self, argument: Any) -> None:
        arguments, named = self.stack.pop(), self.stack.pop()
        if not isinstance(named, _Named) or not isinstance(arguments, tuple):
            raise ValueError("REDUCE without a function")
        self.stack.append(_rebuild(self.path, named, arguments))

    def _binpersid(self, argument: Any) -> None:
        self.stack.append(_storage(self.path, self.stack.pop()))

    def _setitem(self, argument: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._target(_Dict).items[_plain_key(key)] = value

    def _setitems(self, argument: Any) -> None:
        items = self._since_mark()
        pairs = zip(map(_plain_key, items[::2]), items[1::2], strict=True)
        self._target(_Dict).items.update(pairs)

    def _append(self, argument: Any) -> None:
        value = self.stack.pop()
        self._target(list).append(value)

    def _appends(self, argument: Any) -> None:
        items = self._since_mark()
        self._target(list).extend(items)

    _additems = _appends

    def _build(self, argument: Any) -> None:
        # The state of an OrderedDict (its _metadata) or of a parameter: not tensors.
        self.stack.pop()

    def _target(self, kind: type[Any]) -> Any:
        target = self.stack[-1]
        if not isinstance(target, kind):
            raise ValueError(f"{type(target).__name__} where a {kind.__name__} belongs")
        return target


def _plain_key(key: Any) -> Any:
    """Return a dictionary's key, if it is a plain value: hashing a nested one may not end."""
    if not isinstance(key, str | int | float | None):
        raise ValueError(f"a {type(key).__name__} as the key of a dictionary")
    return key


_CONSTANTS: Final[Mapping[str, Any]] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
}
_TUPLES: Final[Mapping[str, int]] = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LITERALS: Final = frozenset(
    (
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "UNICODE",
        "SHORT_BINSTRING",
        "BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BININT",
        "BININT1",
        "BININT2",
        "INT",
        "LONG1",
        "LONG4",
        "LONG",
        "BINFLOAT",
        "FLOAT",
    )
)
