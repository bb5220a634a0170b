"""The pickle machine, on plain values: two dozen opcodes, and nothing that could run.

The functions that torch's checkpoints name are recognised by name and stand for the record that
they would build; any other name is refused.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from loratool.errors import FileFormatError
from loratool.files.dtypes import DTYPES, dtype_named

__all__ = ["STORAGE_DTYPES", "PickledDict", "PickledTensor", "Storage", "interpret"]

MAX_OPCODES: Final = 4_000_000
MAX_DIMENSIONS: Final = 64

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
    """A dictionary under construction; keys of any hashable kind."""

    items: dict[Any, Any] = field(default_factory=dict)


class _Mark:
    """The place on the stack where a MARK opcode stood."""


_MARK: Final = _Mark()


def _rebuild(path: Path, named: _Named, arguments: tuple[Any, ...]) -> Any:
    """What calling ``named`` would build, for the few names that torch's checkpoints use."""
    match named.path:
        case "collections.OrderedDict":
            pairs = arguments[0] if arguments else ()
            return PickledDict({_plain_key(key): value for key, value in pairs})
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor":
            return _tensor(path, arguments)
        case "torch._utils._rebuild_tensor_v3":
            # A dtype that is younger than the format, beside a storage of plain bytes.
            return _tensor(path, (*arguments[:6], *arguments[7:]), arguments[6])
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


def _tensor(path: Path, arguments: tuple[Any, ...], dtype: Any = None) -> PickledTensor:
    storage, offset, shape, strides = arguments[:4]
    lazily = arguments[6] if len(arguments) > 6 else None
    if isinstance(lazily, PickledDict) and any(lazily.items.values()):
        raise FileFormatError(path, "holds a tensor that is conjugated or negated lazily")
    if not isinstance(shape, tuple | list) or not isinstance(strides, tuple | list):
        raise FileFormatError(path, "damaged: a tensor has an impossible shape")
    sizes = [offset, *shape[: MAX_DIMENSIONS + 1], *strides[: MAX_DIMENSIONS + 1]]
    if (
        not isinstance(storage, Storage)
        or len(shape) != len(strides)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size < 1 << 48 for size in sizes)
        or math.prod(shape) >= 1 << 62
    ):
        raise FileFormatError(path, "damaged: a tensor has an impossible shape")
    if dtype is None:
        dtype = storage.dtype
    elif not isinstance(dtype, str) or dtype not in DTYPES or storage.dtype != "U8":
        raise FileFormatError(path, "holds a tensor of an unknown type")
    return PickledTensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _storage(path: Path, persistent: Any) -> Storage:
    try:
        kind, named, key, _, elements, *_ = persistent
        dtype = STORAGE_DTYPES[named.name]
    except (TypeError, ValueError, KeyError, AttributeError):
        raise FileFormatError(path, "damaged: it names a storage of an unknown type") from None
    if kind != "storage" or type(elements) is not int or elements < 0:
        raise FileFormatError(path, "damaged: it names a storage of an unknown type")
    return Storage(dtype, str(key), elements)


def interpret(path: Path, data: IO[bytes]) -> Any:
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
        self.stack.append(PickledDict())

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
        self._target(PickledDict).items[_plain_key(key)] = value

    def _setitems(self, argument: Any) -> None:
        items = self._since_mark()
        pairs = zip(map(_plain_key, items[::2]), items[1::2], strict=True)
        self._target(PickledDict).items.update(pairs)

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
