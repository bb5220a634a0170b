"""One command of a recipe or of a list of jobs, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol

from loratool.errors import OptionError
from loratool.plan.recipe_text import HEADERS, SHA256

__all__ = ["Asked", "Commands", "Done", "Places", "Step", "command_line", "step_from"]

VERB: Final = "verb"
COMMAND: Final = "command"


@dataclass(frozen=True, slots=True)
class Step:
    """One command.

    Attributes:
        verb: Which.
        where: Where it stands, for messages.
        values: Its arguments and options by name, with ``_`` for ``-``.
        words: What follows the verb on a command line, where it is given like that.
        digests: By argument the SHA-256 that its paths have to have, in order.
        headers: The same of what the headers of models say.
    """

    verb: str
    where: str
    values: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    digests: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    headers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Places:
    """Where relative paths lead.

    Attributes:
        folder: Where they begin.
        into: Where those of outputs begin, if elsewhere.
        made: What earlier steps write: paths as they are named, absolute, to where they are.
    """

    folder: Path = Path()
    into: Path | None = None
    made: Mapping[Path, Path] = field(default_factory=dict)

    def named(self, path: Path) -> Path:
        """Return how a path is known to other steps."""
        return Path(*(self.folder / path).absolute().parts)


@dataclass(frozen=True, slots=True)
class Asked:
    """A step as the command line understands it.

    Attributes:
        words: The command line that carries it out, the verb first.
        inputs: The paths that it reads, by the name of the argument or option.
        output: What it writes, as it is named; ``None`` where it writes nothing.
        place: Where that goes.
        writes: All places that it writes to, pictures and pages among them.
        can_rehearse: Whether there is ``--dry-run``.
        again: The command line that replaces what the same one has written; none where it would
            not say so of itself.
    """

    words: tuple[str, ...]
    inputs: Mapping[str, tuple[Path, ...]]
    output: Path | None = None
    place: Path | None = None
    writes: tuple[Path, ...] = ()
    can_rehearse: bool = False
    again: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a command.

    Attributes:
        status: The exit status.
        document: What it prints with ``--json``; ``None`` where that is nothing.
        error: What it says of its failure, as JSON; ``None`` where there is none.
    """

    status: int
    document: Any = None
    error: Mapping[str, Any] | None = None


class Commands(Protocol):
    """What understands and carries out commands."""

    def understand(
        self, step: Step, places: Places, *, defaults: Mapping[str, Any] | None = None
    ) -> Asked:
        """Return what a step asks for; nothing is read or written.

        Args:
            step: The step.
            places: Where its paths lead.
            defaults: Options that it gets where it has them and does not say otherwise.

        Raises:
            OptionError: There is no such command, option or value.
        """
        ...

    def carry_out(self, words: Sequence[str], *, documents: list[Any] | None = None) -> int:
        """Carry out a command line in this process, and return its exit status.

        Args:
            words: The verb and what follows it.
            documents: Where what it prints as JSON goes, instead of standard output.

        Raises:
            Exception: What the command fails with.
        """
        ...

    def attempt(self, words: Sequence[str]) -> Done:
        """Carry out a command line, and return its document or how it failed.

        Raises:
            Exception: What no command raises on purpose, and may go well another time.
        """
        ...


def command_line() -> Commands:
    """Return the command line, which stands above this room: it is named, not known."""
    found: Commands = import_module("loratool.cli.commands").COMMANDS
    return found


def step_from(table: Any, where: str) -> Step:
    """Return the step that a table of a recipe or a line of a list of jobs describes.

    Raises:
        OptionError: It describes none.
    """
    if not isinstance(table, Mapping):
        raise OptionError(where, f"is {_kind(table)}, expected a table of options")
    if COMMAND in table:
        words = table[COMMAND]
        if VERB in table or len(table) > 1:
            other = next(key for key in table if key != COMMAND)
            raise OptionError(where, f"has a command line and {other!r}: one of the two says all")
        if not isinstance(words, list) or not words or not all(map(_is_word, words)):
            raise OptionError(
                where,
                "command has to be a list of words",
                hint='command = ["inspect", "adapter", "--json"]',
            )
        name, *others = map(str, words)
        if name == "loratool" and others:
            name, *others = others
        return Step(name, f"{where} ({name})", words=tuple(others))
    verb = table.get(VERB)
    if not isinstance(verb, str):
        what = "lacks 'verb', the command" if verb is None else f"verb is {_kind(verb)}"
        raise OptionError(where, what, hint='such as verb = "merge"')
    where = f"{where} ({verb})"
    values: dict[str, Any] = {}
    digests: dict[str, dict[str, tuple[str, ...]]] = {SHA256: {}, HEADERS: {}}
    for key, value in table.items():
        name = key.replace("-", "_")
        end = next((end for end in (HEADERS, SHA256) if name.endswith(end)), None)
        if name == VERB:
            continue
        if end is not None:
            digests[end][name.removesuffix(end)] = _digests(value, key, where)
        elif name in values:
            raise OptionError(where, f"has the option {key!r} twice")
        else:
            values[name] = value
    return Step(verb, where, values, (), digests[SHA256], digests[HEADERS])


def _is_word(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _digests(value: Any, key: str, where: str) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) and len(each) == 64 for each in listed):
        raise OptionError(where, f"{key} has to be a SHA-256, or one for each path")
    return tuple(each.lower() for each in listed)


def _kind(value: Any) -> str:
    words = {dict: "a table", list: "a list", str: "a text", bool: "true or false"}
    return words.get(type(value), f"{value!r:.40}")
