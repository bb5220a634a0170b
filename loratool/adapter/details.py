"""Fields of PEFT's configuration that one kind of adapter has for itself."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from loratool.adapter.config import LoraConfig
from loratool.adapter.fields import is_number
from loratool.errors import AdapterError

__all__ = ["chosen", "flag", "number", "whole"]


def number(config: LoraConfig, name: str, default: float, module: str) -> float:
    """Return a number.

    Raises:
        AdapterError: The field holds something else.
    """
    value = _given(config, name, default)
    if not is_number(value):
        raise _wrong(module, name, value, "a number")
    return float(value)


def whole(config: LoraConfig, name: str, default: int, module: str) -> int:
    """Return a whole number.

    Raises:
        AdapterError: The field holds something else.
    """
    value = _given(config, name, default)
    if type(value) is not int:
        raise _wrong(module, name, value, "a whole number")
    return int(value)


def flag(config: LoraConfig, name: str, default: bool, module: str) -> bool:
    """Return whether a field is set.

    Raises:
        AdapterError: The field holds something else than true and false.
    """
    value = _given(config, name, default)
    if value not in (True, False):
        raise _wrong(module, name, value, "true or false")
    return bool(value)


def chosen(config: LoraConfig, name: str, choices: Collection[str], default: str, at: str) -> str:
    """Return one of several names.

    Raises:
        AdapterError: The field holds something else.
    """
    value = _given(config, name, default)
    if value not in choices:
        raise _wrong(at, name, value, f"one of {', '.join(sorted(choices))}")
    return str(value)


def _given(config: LoraConfig, name: str, default: Any) -> Any:
    value = config.raw.get(name)
    return default if value is None else value


def _wrong(module: str, name: str, value: Any, expected: str) -> AdapterError:
    return AdapterError(module, f"{name} is {value!r:.60}, expected {expected}")
