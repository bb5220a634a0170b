"""PEFT's rules for which module a configuration entry means (``peft.utils.other``, 0.15 on).

Most patterns are names: all of them are looked up at once, from the end of a path backwards. The
rest are regular expressions, matched in bounded time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, TypeVar

from loratool.adapter.automaton import Budget
from loratool.adapter.expressions import Expression, ExpressionError
from loratool.errors import AdapterError

__all__ = [
    "matches_target",
    "pattern_matches",
    "pattern_value",
    "pattern_values",
    "suffixes",
]

Value = TypeVar("Value")
MANY_EXPRESSIONS: Final = 1000
MANY_PLACES: Final = 200
PLAIN: Final = re.compile(r"\^?[\w.\-/ ]+")
"""A name, in which a dot stands for any character, as it does in every regular expression."""


def _expression(text: str, budget: Budget | None = None) -> Expression:
    """Return a compiled pattern of the configuration.

    Raises:
        AdapterError: It is no regular expression, or cannot be matched in bounded time.
    """
    try:
        return Expression(text, budget)
    except ExpressionError as error:
        raise AdapterError("adapter_config.json", str(error), code="LT015") from None


_kept = lru_cache(maxsize=1 << 12)(_expression)


def _matches(expression: Expression, name: str, *, is_full: bool) -> bool:
    try:
        return expression.fullmatch(name) if is_full else expression.match(name)
    except ExpressionError as error:
        raise AdapterError("adapter_config.json", str(error), code="LT015") from None


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
        self.others: list[tuple[int, Expression]] = []
        budget = Budget()
        for index, pattern in enumerate(patterns):
            if PLAIN.fullmatch(pattern):
                self._add(index, pattern)
            else:
                self.others.append((index, _expression(_trailing(pattern), budget)))
            if len(self.others) > MANY_EXPRESSIONS:
                raise AdapterError(
                    "adapter_config.json",
                    f"has more than {MANY_EXPRESSIONS} patterns with operators",
                    code="LT015",
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
                    "adapter_config.json",
                    "its patterns have dots in too many ways to be names",
                    code="LT015",
                )
            is_component = place == 0 or module[place - 1] == "."
            for node in nodes if is_component else ():
                found += node.keys
                if place == 0:
                    found += node.whole
        found += [n for n, each in self.others if _matches(each, module, is_full=False)]
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
    return _matches(_kept(_trailing(pattern)), module, is_full=False)


def _trailing(pattern: str) -> str:
    """Return the expression that PEFT makes of a key."""
    return rf"(.*\.)?({pattern})$"


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
        return _matches(_kept(targets), name, is_full=True)
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
