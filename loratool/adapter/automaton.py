"""Regular expressions without backtracking: all ways to match are followed at once.

A parsed expression becomes states that characters lead through (Thompson, "Regular expression
search algorithm", 1968). Time is that of states × characters, whatever the expression; it is
counted too, and ends. What needs a memory of what was matched (back references, conditions,
possessive repeats) cannot be told so and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from re import _constants as of  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, Final

__all__ = ["Automaton", "Budget", "EndlessError", "UnsupportedExpressionError"]

MAX_STATES: Final = 20_000
MAX_STEPS: Final = 3_000_000
MAX_KEPT: Final = 10_000
Test = Callable[[str], bool]


class UnsupportedExpressionError(ValueError):
    """A part of the expression that an automaton does not have."""


class EndlessError(ValueError):
    """More states, or more steps, than a pattern may take."""


@dataclass(slots=True)
class Budget:
    """What all expressions of one configuration may take together.

    Attributes:
        states: That they may have still.
        steps: That matching may take still; what was found once takes none again.
    """

    states: int = MAX_STATES
    steps: int = MAX_STEPS

    def take_state(self) -> None:
        """Note a state.

        Raises:
            EndlessError: There are too many.
        """
        self.states -= 1
        if self.states < 0:
            raise EndlessError("it is too large")

    def take_steps(self, steps: int) -> None:
        """Note steps.

        Raises:
            EndlessError: There are too many.
        """
        self.steps -= steps
        if self.steps < 0:
            raise EndlessError("it takes too many steps")


@dataclass(slots=True)
class _State:
    """Where the match may be: leads on by a character, or freely, or where a condition holds.

    A condition sees the characters around a place, or, where it looks further, all of the text.
    """

    test: Test | None = None
    after: int = -1
    free: list[int] = field(default_factory=list)
    condition: Callable[[str, int], bool] | None = None
    is_look: bool = False


class Automaton:
    """A compiled expression.

    Args:
        text: The expression.
        budget: What it may take; by default one of its own.

    Raises:
        UnsupportedExpressionError: It has parts that need a memory.
        EndlessError: It is too large.
        re.error: It is no regular expression.
    """

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        tree = parser.parse(text)
        if tree.state.flags & (re.MULTILINE | re.IGNORECASE | re.DOTALL | re.ASCII | re.LOCALE):
            raise UnsupportedExpressionError("flags")
        self._states: list[_State] = []
        self._budget = budget or Budget()
        self._kept: dict[tuple[frozenset[int], str, str], frozenset[int]] = {}
        self._end = self._add(_State())
        self._begin = self._sequence(tree, self._end)

    def match(self, text: str, start: int = 0) -> bool:
        """Whether the expression matches some part of ``text`` that begins at ``start``."""
        return self._run(text, start, len(text), is_full=False)

    def fullmatch(self, text: str) -> bool:
        """Whether the expression matches all of ``text``."""
        return self._run(text, 0, len(text), is_full=True)

    def _run(self, text: str, start: int, stop: int, *, is_full: bool, begin: int = -1) -> bool:
        end = self._end
        current = self._started(self._begin if begin < 0 else begin, text, start)
        for place in range(start, stop):
            if end in current and not is_full:
                return True
            if not current:
                return False
            current = self._moved(current, text, place)
        return end in current

    def _started(self, begin: int, text: str, start: int) -> frozenset[int]:
        """Return where a match is before any character."""
        key = (frozenset((begin,)), "", text[:1])
        found = None if start else self._kept.get(key)
        if found is None:
            found, is_far = self._closed((begin,), text, start)
            if not (start or is_far or "\n" in key[2]):
                self._kept[key] = found
        return found

    def _moved(self, current: frozenset[int], text: str, place: int) -> frozenset[int]:
        """Return where the character at ``place`` leads from ``current``."""
        char = text[place]
        key = (current, char, text[place + 1 : place + 2])
        found = self._kept.get(key)
        if found is None:
            states = self._states
            self._budget.take_steps(len(current))
            moved = [
                states[n].after
                for n in current
                if (test := states[n].test) is not None and test(char)
            ]
            found, is_far = self._closed(moved, text, place + 1)
            if not is_far and "\n" not in key[2]:
                if len(self._kept) >= MAX_KEPT:
                    self._kept.clear()
                self._kept[key] = found
        return found

    def _closed(self, places: Iterable[int], text: str, at: int) -> tuple[frozenset[int], bool]:
        """Return all states that ``places`` lead to without a character.

        And whether that depends on more of the text than the characters beside the place.
        """
        waiting, found, is_far = list(places), set(places), False
        while waiting:
            state = self._states[waiting.pop()]
            if state.condition is not None:
                is_far |= state.is_look
                if not state.condition(text, at):
                    continue
            self._budget.take_steps(len(state.free))
            for other in state.free:
                if other not in found:
                    found.add(other)
                    waiting.append(other)
        return frozenset(found), is_far

    # ------------------------------------------------------------------ building

    def _add(self, state: _State) -> int:
        self._budget.take_state()
        self._states.append(state)
        return len(self._states) - 1

    def _sequence(self, tree: Any, after: int) -> int:
        for operation, argument in reversed(list(tree)):
            after = self._part(operation, argument, after)
        return after

    def _part(self, operation: Any, argument: Any, after: int) -> int:
        """Add what matches one part and goes on to ``after``; return where it begins."""
        if operation in (of.LITERAL, of.NOT_LITERAL, of.ANY, of.IN):
            return self._add(_State(_test(operation, argument), after))
        if operation is of.BRANCH:
            return self._add(_State(free=[self._sequence(each, after) for each in argument[1]]))
        if operation is of.SUBPATTERN:
            _, added, removed, body = argument
            if added or removed:
                raise UnsupportedExpressionError("flags")
            return self._sequence(body, after)
        if operation in (of.MAX_REPEAT, of.MIN_REPEAT):
            low, high, body = argument
            return self._repeat(low, high, body, after)
        if operation is of.AT:
            return self._at(argument, after)
        if operation in (of.ASSERT, of.ASSERT_NOT):
            direction, body = argument
            return self._look(body, after, ahead=direction > 0, wanted=operation is of.ASSERT)
        raise UnsupportedExpressionError(str(operation).lower().replace("_", " "))

    def _repeat(self, low: int, high: int, body: Any, after: int) -> int:
        if high >= of.MAXREPEAT:
            loop = self._add(_State(free=[after]))
            self._states[loop].free.append(self._sequence(body, loop))
            begin = loop
        else:
            begin = after
            for _ in range(high - low):
                part = self._sequence(body, begin)
                if part == begin:  # of nothing, however often
                    break
                begin = self._add(_State(free=[after, part]))
        for _ in range(low):
            part = self._sequence(body, begin)
            if part == begin:
                break
            begin = part
        return begin

    def _at(self, where: Any, after: int) -> int:
        if where in (of.AT_BEGINNING, of.AT_BEGINNING_STRING):
            return self._conditional(lambda text, at: at == 0, after)
        if where is of.AT_END_STRING:
            return self._conditional(lambda text, at: at == len(text), after)
        if where is of.AT_END:
            return self._conditional(
                lambda text, at: at == len(text) or (at == len(text) - 1 and text[at] == "\n"),
                after,
            )
        if where in (of.AT_BOUNDARY, of.AT_NON_BOUNDARY):
            wanted = where is of.AT_BOUNDARY
            return self._conditional(lambda text, at: _is_boundary(text, at) is wanted, after)
        raise UnsupportedExpressionError(str(where).lower())

    def _look(self, body: Any, after: int, *, ahead: bool, wanted: bool) -> int:
        accept = self._add(_State())
        begin = self._sequence(body, accept)
        low, high = body.getwidth()

        def holds(text: str, at: int) -> bool:
            if ahead:
                return self._reaches(accept, begin, text, at, len(text), is_full=False) is wanted
            if low != high:
                raise UnsupportedExpressionError("look-behind of any width")
            found = at >= low and self._reaches(accept, begin, text, at - low, at, is_full=True)
            return found is wanted

        return self._conditional(holds, after, is_look=True)

    def _reaches(
        self, accept: int, begin: int, text: str, start: int, stop: int, *, is_full: bool
    ) -> bool:
        end, self._end = self._end, accept
        try:
            return self._run(text, start, stop, is_full=is_full, begin=begin)
        finally:
            self._end = end

    def _conditional(
        self, condition: Callable[[str, int], bool], after: int, *, is_look: bool = False
    ) -> int:
        return self._add(_State(free=[after], condition=condition, is_look=is_look))


def _is_boundary(text: str, at: int) -> bool:
    before, behind = text[at - 1 : at] if at else "", text[at : at + 1]
    return _is_word(before) != _is_word(behind)


def _is_word(char: str) -> bool:
    return char == "_" or char.isalnum()


CATEGORIES: Final[dict[Any, Test]] = {
    of.CATEGORY_DIGIT: str.isdecimal,
    of.CATEGORY_SPACE: str.isspace,
    of.CATEGORY_WORD: _is_word,
    of.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    of.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    of.CATEGORY_NOT_WORD: lambda char: not _is_word(char),
}


def _test(operation: Any, argument: Any) -> Test:
    """Return whether a character is one that a part matches."""
    if operation is of.ANY:
        return lambda char: char != "\n"
    if operation is of.LITERAL:
        return chr(argument).__eq__
    if operation is of.NOT_LITERAL:
        return chr(argument).__ne__
    wanted = True
    tests: list[Test] = []
    for kind, value in argument:
        if kind is of.NEGATE:
            wanted = False
        elif kind is of.RANGE:
            low, high = value
            tests.append(lambda char, low=low, high=high: low <= ord(char) <= high)  # type: ignore[misc]
        elif kind is of.CATEGORY:
            tests.append(CATEGORIES[value])
        else:
            tests.append(_test(kind, value))
    return lambda char: any(test(char) for test in tests) is wanted
