"""Regular expressions whose time is bounded, whoever wrote them.

Those that backtracking can only make a little slower are left to Python's own ``re``, which is
quick; all others are matched by an automaton.
"""

from __future__ import annotations

import math
import re
import reprlib
from functools import cached_property
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, Final

from loratool.adapter.automaton import (
    Automaton,
    Budget,
    EndlessError,
    UnsupportedExpressionError,
)

__all__ = ["Expression", "ExpressionError"]

MAX_LENGTH: Final = 2000
FEW_STEPS: Final = 1e5
FEW_REPEATS: Final = 3
LONGEST_NAME: Final = 200
"""Of the usual ones; what is longer is matched by an automaton."""


class ExpressionError(ValueError):
    """A text that is no regular expression, or one that might take for ever to match."""


class Expression:
    """A regular expression.

    Args:
        text: As people write it.
        budget: What it may take together with others; by default one of its own.

    Raises:
        ExpressionError: It is none, or cannot be matched in bounded time.
    """

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        if len(text) > MAX_LENGTH:
            raise ExpressionError(f"a pattern is {len(text)} characters long")
        self.text = text
        self._budget = budget or Budget()
        try:
            self._repeats, self._choices = _tries(parser.parse(text))
            self._usual = re.compile(text)
            if not self._is_quick(self._repeats):
                _ = self._automaton
        except (re.error, RecursionError, OverflowError) as error:
            raise ExpressionError(f"{self._shown} is not a regular expression: {error}") from None

    def match(self, name: str) -> bool:
        """Whether it matches some beginning of ``name``.

        Raises:
            ExpressionError: It takes too many steps.
        """
        if self._is_usual(name, self._repeats):
            return self._usual.match(name) is not None
        return self._run(self._automaton, name, is_full=False)

    def fullmatch(self, name: str) -> bool:
        """Whether it matches all of ``name``; raises as :meth:`match` does."""
        if self._is_usual(name, self._repeats):
            return self._usual.fullmatch(name) is not None
        return self._run(self._automaton, name, is_full=True)

    def search(self, name: str) -> bool:
        """Whether it matches anywhere in ``name``; raises as :meth:`match` does."""
        if self._is_usual(name, self._repeats + 1):
            return self._usual.search(name) is not None
        return self._run(self._searcher, name, is_full=False)

    @property
    def _shown(self) -> str:
        return reprlib.repr(self.text)

    def _is_quick(self, repeats: int) -> bool:
        return repeats < FEW_REPEATS and self._choices * LONGEST_NAME**repeats <= FEW_STEPS

    def _is_usual(self, name: str, repeats: int) -> bool:
        return len(name) <= LONGEST_NAME and self._is_quick(repeats)

    @cached_property
    def _automaton(self) -> Automaton:
        return self._made(self.text)

    @cached_property
    def _searcher(self) -> Automaton:
        return self._made(rf"[\s\S]*(?:{self.text})")

    def _made(self, text: str) -> Automaton:
        try:
            return Automaton(text, self._budget)
        except (UnsupportedExpressionError, re.error) as error:
            what = error if isinstance(error, UnsupportedExpressionError) else "flags"
            raise ExpressionError(
                f"the pattern {self._shown} has {what}, which might never end"
            ) from None
        except EndlessError as error:
            raise self._endless(error) from None

    def _run(self, automaton: Automaton, name: str, *, is_full: bool) -> bool:
        try:
            return automaton.fullmatch(name) if is_full else automaton.match(name)
        except EndlessError as error:
            raise self._endless(error) from None

    def _endless(self, error: EndlessError) -> ExpressionError:
        return ExpressionError(f"the pattern {self._shown} could take for ever to match: {error}")


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
