"""PEFT's rules for which module a configuration entry means (``peft.utils.other``, 0.15 on)."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, Final, TypeVar

from loratool.errors import AdapterError

__all__ = ["matches_target", "pattern_matches", "pattern_value", "pattern_values"]

Value = TypeVar("Value")
MAX_PATTERN_LENGTH: Final = 2000
MAX_STEPS: Final = 2e9
MAX_CHOICES: Final = 1e8


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A regular expression, and how much it can cost to match it.

    Attributes:
        expression: The compiled expression.
        text: What it was compiled from.
        repeats: How many of its parts repeat without a bound; each may try every length.
    """

    expression: re.Pattern[str]
    text: str
    repeats: int

    def check(self, name: str) -> None:
        """Make sure that matching ``name`` ends soon enough.

        Raises:
            AdapterError: It might not.
        """
        if float(len(name) + 1) ** self.repeats > MAX_STEPS:
            raise _endless(self.text)


def _endless(text: str) -> AdapterError:
    return AdapterError(
        "adapter_config.json", f"the pattern {reprlib.repr(text)} could take for ever to match"
    )


def _measure(tree: Any, *, inside: bool = False) -> tuple[int, float]:
    """Return the number of unbounded repeats in a parsed pattern, and the choices it offers.

    A repeat of something that itself repeats or branches is the classic of exponential
    backtracking; it counts as endless, for nobody needs it to name modules.
    """
    repeats, choices = 0, 1.0
    for operation, argument in tree:
        name = str(operation)
        inner: list[tuple[Any, bool]] = []
        if "REPEAT" in name:
            low, high, body = argument
            is_loop = high > low + 1
            repeats += is_loop
            if inside and is_loop:
                choices = math.inf
            inner = [(body, inside or is_loop)]
        elif name == "BRANCH":
            choices *= math.inf if inside else len(argument[1])
            inner = [(branch, inside) for branch in argument[1]]
        elif name in ("SUBPATTERN", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
            inner = [(argument[-1] if isinstance(argument, tuple) else argument, inside)]
        for body, is_inside in inner:
            more, times = _measure(body, inside=is_inside)
            repeats, choices = repeats + more, choices * times
    return repeats, choices


@lru_cache(maxsize=1 << 16)
def _compile(text: str) -> _Pattern:
    if len(text) > MAX_PATTERN_LENGTH:
        raise AdapterError("adapter_config.json", f"a pattern is {len(text)} characters long")
    try:
        repeats, choices = _measure(parser.parse(text))
        if choices > MAX_CHOICES:
            raise _endless(text)
        return _Pattern(re.compile(text), text, repeats)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(
            "adapter_config.json", f"{reprlib.repr(text)} is not a regular expression: {error}"
        ) from None


def pattern_matches(pattern: str, module: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` means ``module``.

    The key is a regular expression that must match whole trailing components of the path, or
    all of it where the key begins with ``^``.
    """
    compiled = _compile(rf"(.*\.)?({pattern})$")
    compiled.check(module)
    return compiled.expression.match(module) is not None


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
        compiled = _compile(targets)
        compiled.check(name)
        return compiled.expression.fullmatch(name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
