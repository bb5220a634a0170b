"""Pickles of dataclasses, read as records: what they are called, and what was set on them.

Nothing is imported, called or compared but text: a class or a function that a pickle names is the
name, what would be called is a record of name and arguments, what would be set a record's state.
The bounds are those of :mod:`loratool.files.pickle_machine`, whose opcodes these are, with those
that Python's own pickles (protocols 2 to 5) have more.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from loratool.errors import FileFormatError
from loratool.files.json import is_text
from loratool.files.pickle_machine import OPCODES, Machine, Opcodes

__all__ = ["Pairs", "Record", "read_records"]

MAX_NAME: Final = 200
MAX_DEPTH: Final = 4


@dataclass(slots=True, eq=False)
class Record:
    """Something that would be made of a class or by a function.

    Attributes:
        name: The dotted name.
        arguments: What it would be called with; empty for the class or the function itself.
        state: What would be set on it.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None

    @property
    def kind(self) -> str:
        """The last component of the name: modules move between releases."""
        return self.name.rpartition(".")[2]

    @property
    def fields(self) -> Mapping[str, Any]:
        """What was set on it, by name."""
        state = self.state
        return state.named() if isinstance(state, Pairs) else {}


@dataclass(slots=True, eq=False)
class Pairs:
    """A dictionary, whose keys may be records."""

    items: list[tuple[Any, Any]] = field(default_factory=list)

    def named(self) -> dict[str, Any]:
        """Return what has text as its key."""
        return {key: value for key, value in self.items if isinstance(key, str)}


def read_records(path: Path, data: bytes) -> Any:
    """Return what a pickle describes.

    Raises:
        FileFormatError: It is damaged, or longer than a description is.
    """
    return _Records(path).run(io.BytesIO(data), WIDER)


class _Records(Machine):
    """The machine, whose classes are records."""

    def _empty_dict(self, argument: Any) -> None:
        self.stack.append(Pairs())

    def _dict(self, argument: Any) -> None:
        items = self._since_mark()
        self.stack.append(Pairs(list(zip(items[::2], items[1::2], strict=True))))

    def _list(self, argument: Any) -> None:
        items = self._since_mark()
        self.stack.append(items)

    def _frozenset(self, argument: Any) -> None:
        self._list(argument)

    def _empty_set(self, argument: Any) -> None:
        self.stack.append([])

    def _additems(self, argument: Any) -> None:
        self._appends(argument)

    def _setitem(self, argument: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.moved += 1
        self._pairs().append((key, value))

    def _setitems(self, argument: Any) -> None:
        items = self._since_mark()
        self._pairs().extend(zip(items[::2], items[1::2], strict=True))

    def _pairs(self) -> list[tuple[Any, Any]]:
        target = self.stack[-1]
        if isinstance(target, Record):  # an ordered dictionary
            target.state = target.state if isinstance(target.state, Pairs) else Pairs()
            target = target.state
        if not isinstance(target, Pairs):
            raise ValueError("items of what is no dictionary")
        return target.items

    def _append(self, argument: Any) -> None:
        if isinstance(self.stack[-2], Record):
            self.stack.pop()
            return
        super()._append(argument)

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition("\n")
        self._name(module, name)

    def _stack_global(self, argument: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        whole = f"{module}.{name}"
        if len(whole) > MAX_NAME or not whole.isprintable() or not is_text(whole):
            raise FileFormatError(self.path, "damaged: its pickle names something impossible")
        self.stack.append(Record(whole))

    def _reduce(self, argument: Any) -> None:
        arguments, named = self.stack.pop(), self.stack.pop()
        self._made(named, arguments)

    _newobj = _reduce

    def _newobj_ex(self, argument: Any) -> None:
        self.stack.pop()
        self._reduce(argument)

    def _made(self, named: Any, arguments: Any) -> None:
        if not isinstance(named, Record) or not isinstance(arguments, tuple):
            raise ValueError("REDUCE without a function")
        self.stack.append(Record(named.name, arguments))

    def _build(self, argument: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Record):
            raise ValueError("a state for something that has none")
        target.state = state

    def _memoize(self, argument: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _frame(self, argument: Any) -> None: ...

    def _pop(self, argument: Any) -> None:
        self.stack.pop()

    def _binbytes(self, argument: bytes) -> None:
        self.stack.append(argument)

    _short_binbytes = _binbytes

    def _short_binunicode(self, argument: str) -> None:
        self.stack.append(argument)

    def _binpersid(self, argument: Any) -> None:
        raise ValueError("a storage in a description")


def _sized(form: str) -> Any:
    kind = struct.Struct(form)

    def read(data: IO[bytes]) -> bytes:
        (size,) = kind.unpack(data.read(kind.size))
        found = data.read(size)
        if len(found) < size:
            raise ValueError("its end is missing")
        return found

    return read


def _text(data: IO[bytes]) -> str:
    found: bytes = _sized("<B")(data)
    return found.decode("utf-8", "surrogatepass")


def _eight(data: IO[bytes]) -> bytes:
    found = data.read(8)
    if len(found) < 8:
        raise ValueError("its end is missing")
    return found


def _none(data: IO[bytes]) -> None:
    """Read no argument."""


WIDER: Final[Opcodes] = {
    **OPCODES,
    b"\x95": ("FRAME", _eight),
    b"\x8c": ("SHORT_BINUNICODE", _text),
    b"\x94": ("MEMOIZE", _none),
    b"\x93": ("STACK_GLOBAL", _none),
    b"\x81": ("NEWOBJ", _none),
    b"\x92": ("NEWOBJ_EX", _none),
    b"\x90": ("ADDITEMS", _none),
    b"\x91": ("FROZENSET", _none),
    b"d": ("DICT", _none),
    b"l": ("LIST", _none),
    b"0": ("POP", _none),
    b"B": ("BINBYTES", _sized("<I")),
    b"C": ("SHORT_BINBYTES", _sized("<B")),
}
