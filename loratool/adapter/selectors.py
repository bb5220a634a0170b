"""Patterns that people write for modules: components, paths, ranges, globs, regular expressions.

Without ``re:`` a pattern means a run of whole components of a name, wherever it stands:
``te1``, ``self_attn``, ``layers.0-11`` (a range of numbers), ``layers.*.mlp``. ``*``, ``?`` and
``[…]`` stand for characters, dots included. All of it is matched in bounded time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Final, Protocol

from loratool.adapter.expressions import Expression, ExpressionError
from loratool.errors import OptionError

__all__ = ["EXPRESSION", "GLOB", "PartlyMeantError", "Selector", "Spellings", "selector"]

EXPRESSION: Final = "re:"
GLOB: Final = "glob:"
MAX_LENGTH: Final = 2000
MAX_STEPS: Final = 50_000_000
"""Several times what the names of a hundred thousand modules take; some seconds."""
RANGE: Final = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")
NUMBER: Final = re.compile(r"[0-9]{1,9}(?=\.|\Z)")
TOKEN: Final = re.compile(r"\*|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Spellings:
    """All that one module is called.

    Attributes:
        names: Its names, of which any may be meant.
        parts: Where it is several modules in another naming, the names of each of these.
    """

    names: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...] = ()


class PartlyMeantError(Exception):
    """A pattern means some of the modules that one module is in another naming, and not all.

    Attributes:
        module: The module.
        part: One that it means.
        other: One that it does not.
    """

    def __init__(self, module: str, part: str, other: str) -> None:
        super().__init__(module, part, other)
        self.module = module
        self.part = part
        self.other = other

    def refusal(self, pattern: Selector, where: object, verb: str) -> OptionError:
        """Return the error of a pattern in the command line.

        Args:
            pattern: The pattern.
            where: The adapter or model that it is for.
            verb: What to do with the whole module instead, such as ``leave out``.
        """
        return OptionError(
            pattern.option,
            f"{pattern.text!r} means a part of {self.module!r} of {where}, which is one module "
            f"there: it has {self.part!r} and {self.other!r} in one",
            hint=f"{verb} all of it: {self.module}",
        )


class _Matcher(Protocol):
    """What a pattern is matched with."""

    def search(self, name: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Selector:
    """A pattern.

    Attributes:
        text: As it was written.
        option: Where it comes from, for messages.
        matcher: What it is matched with.
    """

    text: str
    option: str
    matcher: _Matcher

    @property
    def is_marked(self) -> bool:
        """Whether the text says what kind of pattern it is."""
        return self.text.startswith((EXPRESSION, GLOB))

    def matches(self, name: str) -> bool:
        """Whether it means something in one name.

        Raises:
            OptionError: It takes too long.
        """
        try:
            return self.matcher.search(name)
        except ExpressionError as error:
            raise OptionError(self.option, str(error)) from None

    def means(self, module: Spellings) -> bool:
        """Whether it means a module, by any of its names, or by those of all of its parts.

        Raises:
            PartlyMeantError: It means some of the parts only.
            OptionError: It takes too long.
        """
        if any(map(self.matches, module.names)):
            return True
        meant = [any(map(self.matches, names)) for names in module.parts]
        if any(meant) and not all(meant):
            part, other = (module.parts[meant.index(is_meant)][0] for is_meant in (True, False))
            raise PartlyMeantError(module.names[0], part, other)
        return bool(meant) and all(meant)


def selector(text: str, option: str, *, bare_is_expression: bool = False) -> Selector:
    """Return the pattern that ``text`` is.

    Args:
        text: With ``re:`` or ``glob:`` before it, or bare.
        option: Where it comes from, for messages.
        bare_is_expression: Whether a bare text is a regular expression.

    Raises:
        OptionError: It is empty, too long, or no regular expression.
    """
    is_expression = bare_is_expression
    body = text
    for prefix in (EXPRESSION, GLOB):
        if text.startswith(prefix):
            is_expression, body = prefix == EXPRESSION, text.removeprefix(prefix)
    if len(body) > MAX_LENGTH:
        raise OptionError(option, f"a pattern is {len(body)} characters long")
    if not body and not bare_is_expression:
        raise OptionError(option, f"{text!r} has no pattern")
    try:
        matcher: _Matcher = Expression(body) if is_expression else _Run(body)
    except ExpressionError as error:
        raise OptionError(option, str(error)) from None
    return Selector(text, option, matcher)


class _Run:
    """A run of whole components: the places that its beginnings lead to, all at once."""

    def __init__(self, text: str) -> None:
        self._tokens = tuple(_tokens(text))
        self._steps = 0

    def search(self, name: str) -> bool:
        """Whether ``name`` has such a run.

        Raises:
            ExpressionError: It takes too many steps.
        """
        places = {0, *(place + 1 for place, char in enumerate(name) if char == ".")}
        for token in self._tokens:
            self._steps += len(places)
            if self._steps > MAX_STEPS:
                raise ExpressionError("a pattern takes too many steps on these names")
            places = set(_after(token, name, places))
            if not places:
                return False
        return any(place == len(name) or name[place] == "." for place in places)


def _tokens(text: str) -> Iterator[str | tuple[int, int]]:
    """Yield single characters, ``*``, ``?``, ``[…]``, and ranges of numbers.

    Raises:
        ExpressionError: A range is empty.
    """
    for index, component in enumerate(text.split(".")):
        if index:
            yield "."
        found = RANGE.fullmatch(component)
        if found is not None:
            first, last = int(found[1]), int(found[2])
            if first > last:
                raise ExpressionError(f"the range {component} is empty")
            yield first, last
        else:
            yield from TOKEN.findall(component)


def _after(token: str | tuple[int, int], name: str, places: set[int]) -> Iterator[int]:
    """Yield where a name goes on behind a token that begins at one of ``places``."""
    if token == "*":
        yield from range(min(places), len(name) + 1)
        return
    for place in places:
        if isinstance(token, tuple):
            found = NUMBER.match(name, place)
            if found is not None and token[0] <= int(found[0]) <= token[1]:
                yield found.end()
        elif place < len(name) and _is_one(token, name[place]):
            yield place + 1


@lru_cache(maxsize=1 << 14)
def _is_one(token: str, char: str) -> bool:
    """Whether a token that stands for one character stands for this one."""
    return token in (char, "?") or (len(token) > 1 and fnmatchcase(char, token))
