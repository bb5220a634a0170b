"""PEFT's rules for which module a configuration entry means (``peft.utils.other``, 0.15 on)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final, TypeVar

from loratool.errors import AdapterError

__all__ = ["matches_target", "pattern_matches", "pattern_value", "pattern_values"]

Value = TypeVar("Value")
MAX_PATTERN_LENGTH: Final = 2000
MAX_UNBOUNDED: Final = 8
UNBOUNDED: Final = re.compile(r"(?<!\\)[*+]|\{\d*,\d*\}")
NESTED: Final = re.compile(r"\([^()]*(?:[*+]|\{\d*,\d*\})[^()]*\)(?:[*+]|\{\d*,)")
"""A repeated group with a repetition in it: the classic of exponential backtracking."""


@lru_cache(maxsize=4096)
def _compile(text: str) -> re.Pattern[str]:
    if len(text) > MAX_PATTERN_LENGTH:
        raise AdapterError("adapter_config.json", f"a pattern is {len(text)} characters long")
    if NESTED.search(text) or len(UNBOUNDED.findall(text)) > MAX_UNBOUNDED:
        raise AdapterError(
            "adapter_config.json", f"the pattern {text!r} could take for ever to match"
        )
    try:
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
