"""The pickle machine, on plain values: two dozen opcodes, and nothing that could run.

The functions that torch's checkpoints name are recognised by name and stand for the record that
they would build; any other name is refused. What ``torch.load(weights_only=True)`` refuses, or
reads otherwise than this machine could tell, is refused here too: the opcodes are those of torch's
own machine, and a storage is one thing, whoever names it.

Bounds: ``MAX_OPCODES`` steps; values moved in them at most ``MOVES`` times as many, so that the
time is that of the steps; what a pickle names (functions, storages, keys) is text or a number
where it arrives, so that nothing nested is ever hashed, compared or printed. Nothing here recurses.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from loratool.errors import FileFormatError
from loratool.files.dtypes import DTYPES, dtype_named
from loratool.files.json import is_text

__all__ = [
    "OPCODES",
    "STORAGE_DTYPES",
    "Machine",
    "Opcodes",
    "PickledDict",
    "PickledTensor",
    "Storage",
    "interpret",
]

Opcodes = Mapping[bytes, tuple[str, Callable[[IO[bytes]], Any]]]
"""By their bytes: the name, and what reads the argument."""

MAX_OPCODES: Final = 4_000_000
MOVES: Final = 4
"""How often a value may be moved into containers, on average."""
SOME: Final = 1000
MAX_DIMENSIONS: Final = 64
MAX_NAME: Final = 200
LOCATION: Final = re.compile(r"(cpu|cuda|mps|xpu|hpu|npu|xla|mtia|privateuseone)(:\d+)?")
TENSOR_TYPES: Final = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
ARGUMENTS: Final = {
    "collections.OrderedDict": (0, 1),
    "torch._utils._rebuild_tensor": (4, 4),
    "torch._utils._rebuild_tensor_v2": (6, 7),
    "torch._utils._rebuild_tensor_v3": (7, 8),
    "torch._utils._rebuild_parameter": (3, 3),
    "torch._utils._rebuild_parameter_with_state": (4, 4),
    "torch.Size": (0, 1),
    "builtins.set": (0, 1),
    "torch.device": (1, 2),
    "_codecs.encode": (1, 3),
}
"""How many arguments each function takes."""


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
STORAGES: Final = {"torch.storage.UntypedStorage"} | {
    f"{module}.{name}"
    for module in ("torch", "torch.cuda")
    for name in STORAGE_DTYPES
    if name != "UntypedStorage"
}


KNOWN: Final = frozenset(
    ("torch._tensor._rebuild_from_type_v2", *ARGUMENTS, *TENSOR_TYPES, *STORAGES)
)
"""All that a pickle may name, beside dtypes."""


@dataclass(frozen=True, slots=True)
class _Named:
    """A global that the pickle names: never imported, only compared."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements in the file: its dtype, its name there, and how many it holds."""

    dtype: str
    key: str
    elements: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A view of a storage: its dtype, first element, shape and strides, in elements.

    The dtype is that of the storage, or any other where the storage is one of plain bytes.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(slots=True)
class PickledDict:
    """A dictionary under construction, ordered or plain."""

    items: dict[Any, Any] = field(default_factory=dict)
    is_ordered: bool = False


@dataclass(frozen=True, slots=True)
class _Dtype:
    """A dtype of torch's."""

    name: str


class _Opaque:
    """Something that tensors do not need: a device, bytes, a set."""


def _rebuild(path: Path, named: _Named, arguments: tuple[Any, ...]) -> Any:
    """What calling ``named`` would build, for the few names that torch's checkpoints use."""
    if named.path == "torch._tensor._rebuild_from_type_v2":
        # A function, the type that its result is given, its arguments, and what is set on it.
        function, kind, inner, state = arguments
        if (
            not (isinstance(function, _Named) and function.path in ARGUMENTS)
            or not (isinstance(kind, _Named) and kind.path in TENSOR_TYPES)
            or not isinstance(inner, tuple)
            or not _is_empty(state)
        ):
            raise ValueError("a tensor of a type of its own")
        named, arguments = function, inner
    fewest, most = ARGUMENTS.get(named.path, (0, len(arguments)))
    if not fewest <= len(arguments) <= most:
        raise ValueError(f"{named.path} with {len(arguments)} arguments")
    match named.path:
        case "collections.OrderedDict":
            pairs = arguments[0] if arguments else ()
            if not isinstance(pairs, list | tuple):
                raise ValueError("an OrderedDict of no pairs")
            return PickledDict({_plain_key(key): value for key, value in pairs}, is_ordered=True)
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor":
            return _tensor(path, arguments)
        case "torch._utils._rebuild_tensor_v3":
            # A dtype that is younger than the format, beside a storage of plain bytes.
            return _tensor(path, (*arguments[:6], *arguments[7:]), arguments[6])
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
            if not isinstance(arguments[0], PickledTensor):
                raise ValueError("a parameter that is no tensor")
            _check_gradient(arguments[1], arguments[2], arguments[0].dtype)
            if not all(map(_is_empty, arguments[3:])):
                raise ValueError("a parameter with a state of its own")
            return arguments[0]
        case "torch.Size":
            sizes = arguments[0] if arguments else ()
            if not isinstance(sizes, list | tuple) or not all(type(n) is int for n in sizes):
                raise ValueError("a size of no numbers")
            return tuple(sizes)
        case "builtins.set" | "torch.device" | "_codecs.encode":
            if not all(isinstance(each, str | int | list) for each in arguments):
                raise ValueError(f"{named.path} of something else")
            return _Opaque()
        case _:
            raise ValueError(f"a call of {named.path}")


def _tensor(path: Path, arguments: tuple[Any, ...], dtype: Any = None) -> PickledTensor:
    storage, offset, shape, strides = arguments[:4]
    lazily = arguments[6] if len(arguments) > 6 else None
    if not (lazily is None or isinstance(lazily, PickledDict)):
        raise ValueError("a tensor with unknown properties")
    if lazily is not None and any(lazily.items.values()):
        raise FileFormatError(path, "holds a tensor that is conjugated or negated lazily")
    if not isinstance(shape, tuple | list) or not isinstance(strides, tuple | list):
        raise FileFormatError(path, "damaged: a tensor has an impossible shape")
    sizes = [offset, *shape[: MAX_DIMENSIONS + 1], *strides[: MAX_DIMENSIONS + 1]]
    if not isinstance(storage, Storage):
        raise FileFormatError(path, "damaged: a tensor without a storage")
    if (
        len(shape) != len(strides)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size < 1 << 48 for size in sizes)
        or math.prod(shape) >= 1 << 62
    ):
        raise FileFormatError(path, "damaged: a tensor has an impossible shape")
    if dtype is None:
        dtype = storage.dtype
    elif not isinstance(dtype, _Dtype) or storage.dtype != "U8":
        raise FileFormatError(path, "holds a tensor of an unknown type")
    else:
        dtype = dtype.name
    if len(arguments) > 4:
        _check_gradient(arguments[4], arguments[5], dtype)
    held = storage.elements * DTYPES[storage.dtype].bits
    if math.prod(shape) * DTYPES[dtype].bits > held:
        raise FileFormatError(
            path,
            f"holds a tensor larger than its storage, {math.prod(shape)} elements in "
            f"{held // 8} bytes (an expanded one, which repeats itself)",
            hint="save a copy of it: tensor.contiguous()",
        )
    return PickledTensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _check_gradient(is_wanted: Any, hooks: Any, dtype: str) -> None:
    is_number = DTYPES[dtype].is_float or dtype.startswith("C")
    if not isinstance(is_wanted, bool) or (is_wanted and not is_number):
        raise ValueError(f"a gradient of {dtype}")
    if not _is_empty(hooks):
        raise ValueError("a tensor with hooks")


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, PickledDict) and not value.items)


def _storage(path: Path, persistent: Any, *, has_view: bool) -> Storage:
    try:
        view = None
        if has_view:
            *persistent, view = persistent
        kind, named, key, location, elements = persistent
        if not (isinstance(named, _Named) and named.path in STORAGES):
            raise TypeError
        dtype = STORAGE_DTYPES[named.name]
    except (TypeError, ValueError, KeyError):
        raise FileFormatError(path, "damaged: it names a storage of an unknown type") from None
    if not (
        isinstance(kind, str)
        and kind == "storage"
        and isinstance(key, str)
        and isinstance(location, str)
        and LOCATION.fullmatch(location)
        and type(elements) is int
        and 0 <= elements < 1 << 48
    ):
        raise FileFormatError(path, "damaged: it names a storage of an unknown type")
    if view is not None:
        raise FileFormatError(
            path,
            f"storage {key[:MAX_NAME]!r} is a view of another one",
            hint="load and save it with torch, once",
        )
    return Storage(dtype, key, elements)


def interpret(
    path: Path, data: IO[bytes], *, has_views: bool = False
) -> tuple[Any, dict[str, Storage]]:
    """Interpret the pickle that begins where ``data`` stands, and leave ``data`` behind it.

    Args:
        path: The file, for messages.
        data: The pickle.
        has_views: Whether storages say which part of another one they are, as in torch's older
            format; only those that are none are taken.

    Returns:
        What it describes, and the storages that it names, by their keys.
    """
    machine = Machine(path, has_views=has_views)
    value = machine.run(data, OPCODES)
    return value, machine.storages


class Machine:
    """The pickle machine, on values that cannot do anything.

    Attributes:
        stack: What the next opcodes take; the stacks below a MARK wait in ``below``.
        storages: Every storage that was named.
        moved: How many values have gone into containers.
    """

    def __init__(self, path: Path, *, has_views: bool = False) -> None:
        self.path = path
        self.has_views = has_views
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.moved = 0

    def run(self, data: IO[bytes], opcodes: Opcodes) -> Any:
        """Interpret the pickle that begins where ``data`` stands, and leave ``data`` behind it.

        Raises:
            FileFormatError: It is damaged, or says something that is not carried out.
        """
        begin = data.tell()
        try:
            for count in range(1, MAX_OPCODES):
                code = data.read(1)
                if not code:
                    raise FileFormatError(self.path, "truncated: its pickle has no end")
                if code not in opcodes:
                    raise FileFormatError(
                        self.path,
                        f"its pickle uses the opcode {code!r}; torch's weights-only loader would "
                        "not read it either",
                        hint="save it again with torch.save, or as safetensors",
                    )
                name, read = opcodes[code]
                if self.step(name, read(data)):
                    return self.stack[-1]
                if self.moved > MOVES * count + SOME:
                    raise FileFormatError(self.path, "its description copies itself over and over")
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise FileFormatError(
                self.path,
                f"damaged: its pickle breaks off {data.tell() - begin} bytes in: "
                + str(error)[:MAX_NAME],
            ) from None
        raise FileFormatError(self.path, "its description is too long to be a checkpoint's")

    def step(self, name: str, argument: Any) -> bool:
        """Carry out one opcode; return whether it was the last."""
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name in _TUPLES:
            count = _TUPLES[name]
            if len(self.stack) < count:
                raise IndexError("a tuple of more than there is")
            items = tuple(self.stack[len(self.stack) - count :])
            del self.stack[len(self.stack) - count :]
            self.moved += count
            self.stack.append(items)
        elif name == "STOP":
            return True
        else:
            getattr(self, f"_{name.lower()}")(argument)
        return False

    def _since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        self.moved += len(items)
        return items

    def _proto(self, argument: Any) -> None: ...

    def _mark(self, argument: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _empty_dict(self, argument: Any) -> None:
        self.stack.append(PickledDict())

    def _empty_list(self, argument: Any) -> None:
        self.stack.append([])

    def _empty_set(self, argument: Any) -> None:
        self.stack.append(_Opaque())

    def _tuple(self, argument: Any) -> None:
        items = tuple(self._since_mark())
        self.stack.append(items)

    def _binput(self, argument: int) -> None:
        self.memo[argument] = self.stack[-1]

    _long_binput = _binput

    def _binget(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    _long_binget = _binget

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition("\n")
        if len(argument) > MAX_NAME or not name.isprintable():
            raise FileFormatError(self.path, "damaged: its pickle names something impossible")
        dtype = dtype_named(name) if module == "torch" else None
        named = _Named(module, name)
        if dtype is None and named.path not in KNOWN:
            raise FileFormatError(
                self.path,
                f"its pickle would call {named.path!r}, which is not executed",
                hint="save the tensors alone, as safetensors, where you trust the file",
            )
        self.stack.append(_Dtype(dtype.name) if dtype else named)

    def _reduce(self, argument: Any) -> None:
        arguments, named = self.stack.pop(), self.stack.pop()
        if not isinstance(named, _Named) or not isinstance(arguments, tuple):
            raise ValueError("REDUCE without a function")
        self.moved += sum(len(each) for each in arguments if isinstance(each, list | tuple))
        self.stack.append(_rebuild(self.path, named, arguments))

    def _binpersid(self, argument: Any) -> None:
        named = self.stack.pop()
        if not isinstance(named, tuple):
            raise ValueError("a storage without a description")
        storage = _storage(self.path, named, has_view=self.has_views)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise FileFormatError(
                self.path, f"damaged: storage {storage.key[:MAX_NAME]!r} is named in two ways"
            )
        self.stack.append(storage)

    def _setitem(self, argument: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.moved += 1
        self._target(PickledDict).items[_plain_key(key)] = value

    def _setitems(self, argument: Any) -> None:
        items = self._since_mark()
        pairs = zip(map(_plain_key, items[::2]), items[1::2], strict=True)
        self._target(PickledDict).items.update(pairs)

    def _append(self, argument: Any) -> None:
        value = self.stack.pop()
        self.moved += 1
        self._target(list).append(value)

    def _appends(self, argument: Any) -> None:
        items = self._since_mark()
        self._target(list).extend(items)

    def _build(self, argument: Any) -> None:
        # The state of an OrderedDict, such as its _metadata; that of a tensor would be another
        # storage for it.
        state = self.stack.pop()
        target = self._target(PickledDict)
        if not target.is_ordered or not isinstance(state, PickledDict):
            raise ValueError("a state for something that has none")

    def _target(self, kind: type[Any]) -> Any:
        target = self.stack[-1]
        if not isinstance(target, kind):
            raise ValueError(f"{type(target).__name__} where a {kind.__name__} belongs")
        return target


def _plain_key(key: Any) -> Any:
    """Return a dictionary's key, if it is a plain value: hashing a nested one may not end."""
    if isinstance(key, str) and not is_text(key):
        raise ValueError("a key that is not text")
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
        "SHORT_BINSTRING",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
    )
)


def _exactly(data: IO[bytes], size: int) -> bytes:
    found = data.read(size)
    if len(found) < size:
        raise ValueError("its end is missing")
    return found


def _none(data: IO[bytes]) -> None:
    """Read no argument."""


def _packed(form: str) -> Callable[[IO[bytes]], Any]:
    kind = struct.Struct(form)
    return lambda data: kind.unpack(data.read(kind.size))[0]


_byte: Final = _packed("<B")
_long: Final = _packed("<I")


def _text(data: IO[bytes]) -> str:
    return _exactly(data, _long(data)).decode("utf-8", "surrogatepass")


def _ascii(data: IO[bytes]) -> str:
    return _exactly(data, _byte(data)).decode("ascii")


def _integer(data: IO[bytes]) -> int:
    return int.from_bytes(_exactly(data, _byte(data)), "little", signed=True)


def _names(data: IO[bytes]) -> str:
    """Read a module and a name, a line each."""
    lines = data.readline(), data.readline()
    if not all(line.endswith(b"\n") for line in lines):
        raise ValueError("its end is missing")
    return "\n".join(line[:-1].decode("ascii") for line in lines)


OPCODES: Final[Opcodes] = {
    b"\x80": ("PROTO", _byte),
    b".": ("STOP", _none),
    b"c": ("GLOBAL", _names),
    b"R": ("REDUCE", _none),
    b"b": ("BUILD", _none),
    b"Q": ("BINPERSID", _none),
    b"(": ("MARK", _none),
    b"t": ("TUPLE", _none),
    b"\x85": ("TUPLE1", _none),
    b"\x86": ("TUPLE2", _none),
    b"\x87": ("TUPLE3", _none),
    b")": ("EMPTY_TUPLE", _none),
    b"]": ("EMPTY_LIST", _none),
    b"}": ("EMPTY_DICT", _none),
    b"\x8f": ("EMPTY_SET", _none),
    b"a": ("APPEND", _none),
    b"e": ("APPENDS", _none),
    b"s": ("SETITEM", _none),
    b"u": ("SETITEMS", _none),
    b"N": ("NONE", _none),
    b"\x88": ("NEWTRUE", _none),
    b"\x89": ("NEWFALSE", _none),
    b"X": ("BINUNICODE", _text),
    b"U": ("SHORT_BINSTRING", _ascii),
    b"J": ("BININT", _packed("<i")),
    b"K": ("BININT1", _byte),
    b"M": ("BININT2", _packed("<H")),
    b"\x8a": ("LONG1", _integer),
    b"G": ("BINFLOAT", _packed(">d")),
    b"q": ("BINPUT", _byte),
    b"r": ("LONG_BINPUT", _long),
    b"h": ("BINGET", _byte),
    b"j": ("LONG_BINGET", _long),
}
"""By their bytes: the name, as Python's ``pickletools`` has it, and what reads the argument.

All that torch's weights-only loader knows, but for NEWOBJ, which no tensor needs.
"""
