"""Plans as JSON: plain data that names classes of this package, and never code.

A value is a JSON value of its own (a tuple is an array), or an object that says what it is:

===============  =================================================================
``{"@": C, …}``  an instance of the class C, with the fields that have no usual value
``"rows"``       beside ``"@"``: several of one class, all fields in the order of ``"of"``
``"+"``          beside ``"@"``: the attributes of an instance of a class without fields
``{"p": …}``     a path: a root and what lies below it
``{"m": …}``     a mapping, as pairs
``{"l": …}``     a list
``{"s": …}``     a set
``{"t": …}``     bytes that are text; ``{"b": …}`` others, in base64
``{"x": …}``     a number that JSON has none for: NaN, infinity
``{"n": …}``     a text that is of a class of its own, or a member of an enumeration
===============  =================================================================
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from enum import Enum
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from loratool.errors import FileFormatError
from loratool.files.inputs import ELSEWHERE, Stamp

__all__ = ["DAMAGED", "as_form", "form_text", "from_form"]

PACKAGE: Final = "loratool"
ROOMS: Final = frozenset(
    [
        "adapter",
        "base",
        "codecs",
        "files",
        "names",
        "plan",
        "schemes",
        "shards",
        "values",
        "variants",
        "verbs",
        "write",
    ]
)
"""Where the classes of plans are; no other module is imported for a form."""
NAME: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
DAMAGED: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What comes of a form that is no form, or of one that was made for other classes."""
PLAIN: Final = (str, int, bool, type(None))

Below = Callable[[Path], tuple[str, str]]
"""Says of a path which root it lies below, and where."""


def form_text(form: Any) -> str:
    """Return a form as text, the same for the same values."""
    return json.dumps(form, separators=(",", ":"), sort_keys=True)


def as_form(value: Any, below: Below) -> Any:
    """Return a value as JSON.

    Args:
        value: Frozen dataclasses of this package, and what they are made of.
        below: Says where paths lie.

    Raises:
        TypeError: It holds something that has no such form, which is a fault of the program.
    """
    kind: Any = type(value)
    if kind in PLAIN:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"x": repr(value)}
    if kind is tuple:
        return _rows(value, below)
    if kind is list:
        return {"l": [as_form(each, below) for each in value]}
    if kind is bytes:
        return _bytes(value)
    if kind is Stamp:  # of the files of one machine only the size is true elsewhere
        mark = value.inode if value.device == ELSEWHERE else 0
        value = Stamp(ELSEWHERE, mark, value.size, 0)
    if isinstance(value, Path):
        return {"p": list(below(value))}
    if isinstance(value, Enum):
        return {"n": [_called(kind), value.name]}
    if isinstance(value, str):
        return {"n": [_called(kind), str(value)]}
    if isinstance(value, frozenset | set):
        return {"s": sorted((as_form(each, below) for each in value), key=form_text)}
    if isinstance(value, Mapping):
        return {"m": [[as_form(k, below), as_form(v, below)] for k, v in value.items()]}
    fields = _fields(kind)
    if fields is not None:
        told = ((name, getattr(value, name), usual) for name, usual in fields.items())
        return {"@": _called(kind)} | {
            name: as_form(each, below)
            for name, each, usual in told
            if usual is MISSING or type(each) is not type(usual) or each != usual
        }
    if not kind.__module__.startswith(f"{PACKAGE}.") or callable(value):
        raise TypeError(f"a plan holds {kind.__module__}.{kind.__qualname__}, which has no form")
    return {"@": _called(kind), "+": {n: as_form(each, below) for n, each in vars(value).items()}}


def _bytes(data: bytes) -> dict[str, str]:
    try:
        return {"t": data.decode()}
    except UnicodeDecodeError:
        return {"b": base64.b64encode(data).decode()}


def _rows(values: tuple[Any, ...], below: Below) -> Any:
    """Return a tuple: instances of one class with its name once."""
    kinds = {type(value) for value in values}
    kind: Any = next(iter(kinds), object)
    fields = _fields(kind) if len(kinds) == 1 and len(values) > 1 and kind is not Stamp else None
    if fields is None:
        return [as_form(value, below) for value in values]
    rows = [[as_form(getattr(value, name), below) for name in fields] for value in values]
    return {"@": _called(kind), "of": list(fields), "rows": rows}


@cache
def _called(kind: type) -> str:
    module = kind.__module__.removeprefix(f"{PACKAGE}.")
    name = f"{module}:{kind.__qualname__}"
    if not kind.__module__.startswith(f"{PACKAGE}.") or NAME.fullmatch(name) is None:
        raise TypeError(f"a plan holds {kind.__module__}.{kind.__qualname__}, which has no form")
    return name


@cache
def _fields(kind: type) -> dict[str, Any] | None:
    """Return the fields that a class is made from, and their usual values.

    Returns:
        ``None`` where it does not say.
    """
    if dataclasses.is_dataclass(kind):
        return {each.name: each.default for each in dataclasses.fields(kind) if each.init}
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return dict.fromkeys(kind._fields, MISSING)
    return None


def from_form(form: Any, placed: Callable[[str, str], Path], where: object) -> Any:
    """Return the value of a form.

    Args:
        form: What :func:`as_form` has made, or a stranger.
        placed: Returns the path that lies below a root.
        where: Where the form is from, for messages.

    Raises:
        FileFormatError: It is damaged, or of another version.
    """
    try:
        return _made(form, placed)
    except FileFormatError:
        raise
    except (*DAMAGED, ImportError, RecursionError) as error:
        raise FileFormatError(
            where, f"is damaged, or of another version of loratool ({type(error).__name__})"
        ) from error


def _made(form: Any, placed: Callable[[str, str], Path]) -> Any:
    if isinstance(form, (*PLAIN, float)):
        return form
    if isinstance(form, list):
        return tuple(_made(each, placed) for each in form)
    match form:
        case {"@": str() as name, "of": [*fields], "rows": [*rows]}:
            return tuple(_new(name, dict(zip(fields, row, strict=True)), placed) for row in rows)
        case {"@": str() as name, "+": dict() as attributes}:
            kind = _class(name)
            if _fields(kind) is not None or issubclass(kind, Enum | str):
                raise ValueError(f"{name} is not made of attributes")
            made = object.__new__(kind)
            for key, each in attributes.items():
                made.__dict__[key] = _made(each, placed)
            return made
        case {"@": str() as name}:
            return _new(name, {key: each for key, each in form.items() if key != "@"}, placed)
        case {"t": str() as text}:
            return text.encode()
        case {"p": [str() as root, str() as below]}:
            return placed(root, below)
        case {"m": pairs}:
            return {_made(key, placed): _made(value, placed) for key, value in pairs}
        case {"l": items}:
            return [_made(each, placed) for each in items]
        case {"s": items}:
            return frozenset(_made(each, placed) for each in items)
        case {"b": str() as text}:
            return base64.b64decode(text, validate=True)
        case {"x": str() as text}:
            return float(text)
        case {"n": [str() as name, str() as text]}:
            kind = _class(name)
            if not issubclass(kind, Enum | str):
                raise ValueError(f"{name} is no text")
            return kind[text] if issubclass(kind, Enum) else kind(text)
    raise ValueError("no form")


def _new(name: str, values: Mapping[str, Any], placed: Callable[[str, str], Path]) -> Any:
    kind = _class(name)
    fields = _fields(kind)
    if fields is None or values.keys() - fields.keys():
        raise ValueError(f"{name} is not made of these fields")
    return kind(**{field: _made(each, placed) for field, each in values.items()})


@cache
def _class(name: str) -> Any:
    """Return a class of this package; importing its modules runs nobody else's code.

    Raises:
        ValueError: There is none of this name.
    """
    if NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is no class")
    module, _, attribute = name.partition(":")
    if module.partition(".")[0] not in ROOMS:
        raise ValueError(f"{name!r} is no class of values")
    found = getattr(import_module(f"{PACKAGE}.{module}"), attribute)
    is_own = isinstance(found, type) and found.__module__ == f"{PACKAGE}.{module}"
    is_value = is_own and (
        _fields(found) is not None
        or issubclass(found, Enum | str)
        or not hasattr(found, "__slots__")
    )
    if not is_value or issubclass(found, BaseException):
        raise ValueError(f"{name!r} is no class of values")
    return found
