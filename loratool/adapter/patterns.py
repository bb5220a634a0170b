"""PEFT's rules for which module a configuration entry means (``peft.utils.other``, 0.15 on).

Most patterns are names: all of them are looked up at once, from the end of a path backwards. Of
the rest, those that backtracking can only make a little slower are left to Python's own ``re``,
which is quick; all others are matched by an automaton, whose time is bounded.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, Final, Protocol, TypeVar

from loratool.adapter.automaton import Automaton, EndlessError, UnsupportedExpressionError
from loratool.errors import AdapterError

__all__ = [
    "matches_target",
    "pattern_matches",
    "pattern_value",
    "pattern_values",
    "suffixes",
]

Value = TypeVar("Value")
MAX_PATTERN_LENGTH: Final = 2000
FEW_STEPS: Final = 1e5
MANY_EXPRESSIONS: Final = 1000
MANY_PLACES: Final = 200
FEW_REPEATS: Final = 3
LONGEST_NAME: Final = 200
"""Of the usual ones; what is longer is matched by an automaton."""
PLAIN: Final = re.compile(r"\^?[\w.\-/ ]+")
"""A name, in which a dot stands for any character, as it does in every regular expression."""


class _Matcher(Protocol):
    """What a regular expression is matched with."""

    def match(self, text: str) -> object: ...
    def fullmatch(self, text: str) -> object: ...


def _tries(tree: Any, *, inside: bool = False) -> tuple[int, float]:
    """Return how many parts of an expression repeat without a bound, and its other choices.

    A repeat of something that itself repeats or branches is the classic of exponential
    backtracking; it counts as endless.
    """
    repeats, choices = 0, 1.0
    if any(str(operation) == "GROUPREF_EXISTS" for operation, _ in tree):
        return 0, math.inf
    for operation, argument in tree:
        name = str(operation)
        inner: list[Any] = []
        is_loop = False
        if "REPEAT" in name:
            low, high, body = argument
            is_loop = high > 1
            if str(high) == "MAXREPEAT":
                repeats += 1
            else:
                choices *= max(high - low + 1, high)
            if inside and high > low:
                choices = math.inf
            inner = [body]
        elif name == "BRANCH":
            choices *= math.inf if inside else len(argument[1])
            inner = argument[1]
        elif name in ("SUBPATTERN", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
            inner = [argument[-1] if isinstance(argument, tuple) else argument]
        for body in inner:
            more, times = _tries(body, inside=inside or is_loop)
            repeats, choices = repeats + more, choices * times
    return repeats, choices


@lru_cache(maxsize=1 << 12)
def _compile(text: str) -> tuple[_Matcher | None, _Matcher | None]:
    """Return what matches names of usual length, if that is sure to end, or what matches all.

    Raises:
        AdapterError: It is no regular expression, or cannot be matched in bounded time.
    """
    if len(text) > MAX_PATTERN_LENGTH:
        raise AdapterError("adapter_config.json", f"a pattern is {len(text)} characters long")
    shown = reprlib.repr(text)
    try:
        repeats, choices = _tries(parser.parse(text))
        is_quick = repeats < FEW_REPEATS and choices * LONGEST_NAME**repeats <= FEW_STEPS
        return (re.compile(text), None) if is_quick else (None, Automaton(text))
    except UnsupportedExpressionError as error:
        raise AdapterError(
            "adapter_config.json", f"the pattern {shown} has {error}, which might never end"
        ) from None
    except EndlessError as error:
        raise _endless(text, error) from None
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(
            "adapter_config.json", f"{shown} is not a regular expression: {error}"
        ) from None


def _endless(text: str, error: EndlessError) -> AdapterError:
    return AdapterError(
        "adapter_config.json",
        f"the pattern {reprlib.repr(text)} could take for ever to match: {error}",
    )


@lru_cache(maxsize=1 << 10)
def _for_long_names(text: str) -> _Matcher:
    try:
        return Automaton(text)
    except UnsupportedExpressionError as error:
        raise _endless(text, EndlessError(f"it has {error}, and the name is long")) from None


def _matches(pattern: str, name: str, *, is_full: bool) -> bool:
    usual, sure = _compile(pattern)
    try:
        matcher = sure or (usual if len(name) <= LONGEST_NAME else _for_long_names(pattern))
        assert matcher is not None
        return bool(matcher.fullmatch(name) if is_full else matcher.match(name))
    except EndlessError as error:
        raise _endless(pattern, error) from None


@dataclass(slots=True)
class _Node:
    """A place in the tree of names, read from their ends.

    Attributes:
        next: By character; a dot leads on whatever the character is.
        keys: The patterns that are complete here, by their place in the file.
        whole: Those of them that mean a whole path.
    """

    next: dict[str, _Node] = field(default_factory=dict)
    keys: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)


class _Table:
    """All patterns of one mapping."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self.root = _Node()
        self.patterns = patterns
        self.others: list[tuple[int, str]] = []
        for index, pattern in enumerate(patterns):
            if PLAIN.fullmatch(pattern):
                self._add(index, pattern)
            else:
                self.others.append((index, pattern))
        if len(self.others) > MANY_EXPRESSIONS:
            raise AdapterError(
                "adapter_config.json", f"has {len(self.others)} patterns with operators"
            )

    def _add(self, index: int, pattern: str) -> None:
        node = self.root
        for char in reversed(pattern.removeprefix("^")):
            node = node.next.setdefault(char, _Node())
        (node.whole if pattern.startswith("^") else node.keys).append(index)

    def hits(self, module: str) -> list[int]:
        """Return the places of all patterns that mean ``module``, in order."""
        if "\n" in module:
            return [n for n, key in enumerate(self.patterns) if pattern_matches(key, module)]
        found: list[int] = []
        nodes = [self.root]
        for place in range(len(module) - 1, -1, -1):
            char = module[place]
            if len(nodes) == 1 and "." not in nodes[0].next:
                nodes = [nodes[0].next[char]] if char in nodes[0].next else []
            else:
                nodes = [after for node in nodes for after in _after(node, char)]
            if not nodes:
                break
            if len(nodes) > MANY_PLACES:
                raise AdapterError(
                    "adapter_config.json", "its patterns have dots in too many ways to be names"
                )
            is_component = place == 0 or module[place - 1] == "."
            for node in nodes if is_component else ():
                found += node.keys
                if place == 0:
                    found += node.whole
        found += [index for index, pattern in self.others if pattern_matches(pattern, module)]
        return sorted(found)


def _after(node: _Node, char: str) -> list[_Node]:
    found = [node.next[char]] if char in node.next else []
    if "." in node.next and char not in ".\n":
        found.append(node.next["."])
    return found


@lru_cache(maxsize=64)
def _table(patterns: tuple[str, ...]) -> _Table:
    return _Table(patterns)


def pattern_matches(pattern: str, module: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` means ``module``.

    The key is a regular expression that must match whole trailing components of the path, or
    all of it where the key begins with ``^``.
    """
    return _matches(rf"(.*\.)?({pattern})$", module, is_full=False)


def pattern_values(patterns: Mapping[str, Value], module: str) -> list[tuple[str, Value]]:
    """Return every entry that means ``module``, in the order of the file."""
    if not patterns:
        return []
    keys = tuple(patterns)
    return [(keys[index], patterns[keys[index]]) for index in _table(keys).hits(module)]


def pattern_value(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """Return the value for ``module``: the first entry that means it, else ``default``.

    A key that is the module's very name counts where none matches as an expression, as in PEFT.
    """
    found = pattern_values(patterns, module)
    return found[0][1] if found else patterns.get(module, default)


def matches_target(targets: str | Iterable[str], name: str) -> bool:
    """Whether ``target_modules`` (or a similar field) means ``name``.

    A string is a regular expression for the whole path; a list holds paths or dotted suffixes.
    """
    if isinstance(targets, str):
        return _matches(targets, name, is_full=True)
    return not _known(targets).isdisjoint(suffixes(name))


def suffixes(name: str) -> list[str]:
    """Return a path and what is behind each of its dots."""
    found = [name]
    place = name.find(".")
    while place >= 0:
        found.append(name[place + 1 :])
        place = name.find(".", place + 1)
    return found


_last: tuple[Iterable[str], frozenset[str]] = ((), frozenset())


def _known(targets: Iterable[str]) -> frozenset[str]:
    """Return targets as a set; the last ones are kept, which are asked about again."""
    global _last
    kept, found = _last
    if kept is not targets:
        found = frozenset(targets)
        _last = (targets, found)
    return found
