"""PEFT's rules for which module a configuration entry means (``peft.utils.other``, 0.15 on)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, Final, TypeVar

from loratool.errors import AdapterError

__all__ = ["matches_target", "pattern_matches", "pattern_value", "pattern_values"]

Value = TypeVar("Value")
MAX_PATTERN_LENGTH: Final = 2000
MAX_REPEATS: Final = 8


def _is_explosive(tree: Any, *, inside: bool = False) -> bool:
    """Whether a parsed pattern repeats something that itself repeats or branches.

    That is the classic of exponential backtracking; nobody needs it to name modules.
    """
    for operation, argument in tree:
        name = str(operation)
        if "REPEAT" in name:
            low, high, body = argument
            repeats = high > low + 1
            if (inside and repeats) or _is_explosive(body, inside=inside or repeats):
                return True
        elif name == "BRANCH":
            if inside or any(_is_explosive(branch) for branch in argument[1]):
                return True
        elif name in ("SUBPATTERN", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
            body = argument[-1] if isinstance(argument, tuple) else argument
            if _is_explosive(body, inside=inside):
                return True
    return False


@lru_cache(maxsize=4096)
def _compile(text: str) -> re.Pattern[str]:
    if len(text) > MAX_PATTERN_LENGTH:
        raise AdapterError("adapter_config.json", f"a pattern is {len(text)} characters long")
    try:
        if _is_explosive(parser.parse(text)) or len(re.findall(r"[*+{]", text)) > MAX_REPEATS:
            raise AdapterError(
                "adapter_config.json", f"the pattern {text!r} could take for ever to match"
            )
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(
            "adapter_config.json", f"{text!r} is not a regular expression: {error}"
        ) from None


def pattern_matches(pattern: str, module: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` means ``module``.

    The key is a regular expression that must match whole trailing components of the path, or
    all of it where the key begins with ``^``.
    """
    return _compile(rf"(.*\.)?({pattern})$").match(module) is not None


def pattern_values(patterns: Mapping[str, Value], module: str) -> list[tuple[str, Value]]:
    """Return every entry that means ``module``, in the order of the file."""
    return [(key, value) for key, value in patterns.items() if pattern_matches(key, module)]


def pattern_value(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """Return the value for ``module``: the first entry that means it, else ``default``."""
    for key, value in patterns.items():
        if pattern_matches(key, module):
            return value
    return default


def matches_target(targets: str | Iterable[str], name: str) -> bool:
    """Whether ``target_modules`` (or a similar field) means ``name``.

    A string is a regular expression for the whole path; a list holds paths or dotted suffixes.
    """
    if isinstance(targets, str):
        return _compile(targets).fullmatch(name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
