"""The command line for what is no terminal: steps of recipes and jobs, as data.

A step names what a command line names. Which arguments and options there are, and of what kind,
only the commands themselves say.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, Final

import click

from loratool.cli import render
from loratool.cli.failures import FAILURE
from loratool.cli.main import COMMANDS as NAMES
from loratool.cli.main import cli
from loratool.cli.pair import Pair
from loratool.errors import LoratoolError, OptionError
from loratool.jobs.step import Asked, Done, Places, Step
from loratool.plan.recipe_text import ARGUMENTS

__all__ = ["COMMANDS", "CommandLine"]

OUTPUT: Final = "output"
WRITTEN: Final = (OUTPUT, "plot", "report", "save_spectrum", "into")
"""Options whose paths are written to."""
IN_PLACE: Final = "in_place"
FORCE: Final = "force"
HUB_NAME: Final = re.compile(r"hf:/.*|[\w.-]+/[\w.-]+(@[\w.-]+)?(/.*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Parameters:
    """What a command takes.

    Attributes:
        command: The command.
        by_name: Its arguments and options, by every name that they have.
        parser: What takes words apart.
    """

    command: click.Command
    by_name: Mapping[str, click.Parameter]
    parser: Any


@cache
def _parameters(verb: str) -> _Parameters:
    """Return what a command takes."""
    context = click.Context(cli)
    command = cli.get_command(context, verb)
    assert command is not None
    found: dict[str, click.Parameter] = {}
    for param in command.params:
        names = (param.name or "", *param.opts)
        found |= {name.lstrip("-").replace("-", "_"): param for name in names}
    parser = command.make_parser(click.Context(command, info_name=verb))
    return _Parameters(command, found, parser)


class CommandLine:
    """The commands, as :class:`Commands` wants them."""

    def __init__(self) -> None:
        self._tried: set[tuple[str, ...]] = set()

    def __reduce__(self) -> str:
        return "COMMANDS"  # the one of the process that it goes to

    def understand(
        self, step: Step, places: Places, *, defaults: Mapping[str, Any] | None = None
    ) -> Asked:
        """See :class:`Commands`."""
        if step.verb not in NAMES:
            raise _unknown(step.where, "command", step.verb, NAMES)
        known = _parameters(step.verb)
        step, parts = _gathered(known, step)
        values = dict(_spelled_out(known, step) if step.words else _checked(known, step))
        for name, value in (defaults or {}).items():
            if name in known.by_name:
                values.setdefault(name, value)
        placed = {name: _placed(known.by_name[name], v, places) for name, v in values.items()}
        words = (step.verb, *_words(known, placed))
        self._try(known, words, placed, step.where)
        paths = {n: v for n, v in placed.items() if _is_path(known.by_name[n])}
        output, place = (each.get(OUTPUT) for each in (values, placed))
        inputs = {n: tuple(map(Path, _listed(v))) for n, v in paths.items() if n not in WRITTEN}
        writes = [Path(paths[name]) for name in WRITTEN if paths.get(name) is not None]
        if placed.get(IN_PLACE):
            writes += inputs.get("path", ())
        for whole, part, span in parts:
            inputs[part] = inputs[whole][span]
        can_replace = FORCE in known.by_name and not placed.get(FORCE)
        return Asked(
            words,
            inputs,
            Path(output) if output is not None else None,
            Path(place) if place is not None else None,
            tuple(writes),
            "dry_run" in known.by_name,
            (words[0], f"--{FORCE}", *words[1:]) if can_replace else (),
        )

    def _try(
        self, known: _Parameters, words: Sequence[str], values: Mapping[str, Any], where: str
    ) -> None:
        """Have the command take its words apart; once, where others differ in paths alone.

        Raises:
            OptionError: A value is none that it takes.
        """
        kinds = ((name, _is_path(known.by_name[name]), value) for name, value in values.items())
        key = (
            words[0],
            *(name if is_path else f"{name}={value}" for name, is_path, value in kinds),
        )
        if key in self._tried:
            return
        try:
            known.command.make_context(words[0], list(words[1:]))
        except click.ClickException as error:
            raise OptionError(where, error.format_message().rstrip(".")) from None
        except LoratoolError as error:
            error.where = f"{where}: {error.where}"
            raise
        self._tried.add(key)

    def carry_out(self, words: Sequence[str], *, documents: list[Any] | None = None) -> int:
        """See :class:`Commands`."""
        verb, *others = words
        known = _parameters(verb)
        quiet = nullcontext() if documents is None else _collecting(documents)
        try:
            with quiet, known.command.make_context(verb, others) as context:
                status = known.command.invoke(context)
        except click.exceptions.Exit as error:
            return error.exit_code
        except click.ClickException as error:
            raise OptionError(verb, error.format_message().rstrip(".")) from None
        return status if isinstance(status, int) else 0

    def attempt(self, words: Sequence[str]) -> Done:
        """See :class:`Commands`."""
        documents: list[Any] = []
        try:
            status = self.carry_out(words, documents=documents)
        except LoratoolError as error:
            return Done(FAILURE, None, error.as_json())
        return Done(status, documents[-1] if documents else None)


COMMANDS: Final = CommandLine()


@contextmanager
def _collecting(documents: list[Any]) -> Iterator[None]:
    """Take documents, and drop what is printed besides.

    Streams are those of all threads, so that only the main one drops it.
    """
    with ExitStack() as stack:
        stack.enter_context(render.collected(documents))
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(redirect_stdout(StringIO()))
            stack.enter_context(redirect_stderr(StringIO()))
        yield


def _unknown(where: str, what: str, name: str, known: Sequence[str]) -> OptionError:
    near = get_close_matches(name, known, n=1)
    words = f"; did you mean {near[0]!r}?" if near else ""
    return OptionError(where, f"there is no {what} {name!r}{words}")


def _spelled_out(known: _Parameters, step: Step) -> Iterator[tuple[str, Any]]:
    """Yield what words of a command line say, by the names of the parameters.

    Raises:
        OptionError: They are none of the command.
    """
    try:
        found, _, order = known.parser.parse_args(list(step.words))
    except click.ClickException as error:
        raise OptionError(step.where, error.format_message().rstrip(".")) from None
    for name in dict.fromkeys(param.name for param in order if param.name):
        value = found.get(name)
        if isinstance(value, tuple | list):
            value = [each for each in value if isinstance(each, str)]
        if value is not None and not (isinstance(value, list) and not value):
            yield name, value


def _gathered(known: _Parameters, step: Step) -> tuple[Step, tuple[tuple[str, str, slice], ...]]:
    """Return a step with the paths under one name that the command line takes one after the other.

    A recipe tells a base from adapters, and may name one of several in the singular.

    Returns:
        The step, and of each name the argument that it is a part of, and which of its paths.
    """
    rest = next((p.name for p in known.command.params if p.nargs == -1 and p.name), None)
    if rest is None:
        return step, ()
    values = dict(step.values)
    names = [*(n for n in ARGUMENTS.get(step.verb, ()) if n not in known.by_name), rest]
    paths: list[Any] = []
    parts = []
    for name in names:
        key = name if name in values else name.removesuffix("s")
        if key in values and key not in known.by_name.keys() - {rest}:
            listed = _listed(values.pop(key))
            parts.append((rest, key, slice(len(paths), len(paths) + len(listed))))
            paths += listed
    if not parts:
        return step, ()
    return replace(step, values={rest: paths, **values}), tuple(parts)


def _checked(known: _Parameters, step: Step) -> Iterator[tuple[str, Any]]:
    """Yield the values of a step by the names of the parameters.

    Raises:
        OptionError: One has no such name, or is of another kind; or something is missing.
    """
    seen: dict[str, str] = {}
    for key, value in step.values.items():
        param = known.by_name.get(key)
        if param is None or not param.expose_value:
            names = [n for n, p in known.by_name.items() if p.expose_value]
            raise _unknown(step.where, "option", key, names)
        if param.name in seen:
            raise OptionError(step.where, f"{key!r} and {seen[param.name]!r} are one option")
        seen[param.name] = key
        _check_kind(param, key, value, step.where)
        yield param.name, value
    for param in known.command.params:
        if param.required and param.name not in seen:
            raise OptionError(step.where, f"lacks {_called(param)!r}")


def _called(param: click.Parameter) -> str:
    """Return what a parameter is called in a recipe."""
    longest = max(param.opts, key=len) if param.opts else param.name or ""
    return longest.lstrip("-")


def _check_kind(param: click.Parameter, key: str, value: Any, where: str) -> None:
    """Make sure that a value is of the kind that its parameter takes.

    Raises:
        OptionError: It is not.
    """
    is_flag = isinstance(param, click.Option) and param.is_flag
    is_many = param.multiple or param.nargs == -1
    expected = None
    if is_flag and not isinstance(value, bool):
        expected = "true or false"
    elif not is_flag and not is_many and not _is_scalar(value):
        expected = "one value"
    elif is_many and not all(map(_is_scalar, _listed(value))):
        expected = "a list of values"
    if expected is not None:
        raise OptionError(where, f"{key} is {value!r:.60}, expected {expected}")


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _is_path(param: click.Parameter) -> bool:
    return isinstance(param.type, click.Path)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _placed(param: click.Parameter, value: Any, places: Places) -> Any:
    """Return a value with its relative paths where they lead."""
    if isinstance(value, list | tuple):
        return [_placed(param, each, places) for each in value]
    if isinstance(param.type, Pair):
        return param.type.placed(str(value), places.folder)
    if not _is_path(param):
        return value
    path = Path(str(value))
    made = places.made.get(places.named(path))
    if made is not None:
        return str(made)
    if path.is_absolute():
        return str(value)
    if param.name in WRITTEN:
        return str((places.into or places.folder) / path)
    place = places.folder / path
    if not place.exists() and HUB_NAME.fullmatch(str(value)) and not path.exists():
        return str(value)  # of a hub, as far as one can see
    return str(place)


def _words(known: _Parameters, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words of a command line that say ``values``; arguments come last."""
    arguments: list[str] = []
    for param in known.command.params:
        if param.name not in values:
            continue
        value = values[param.name]
        if isinstance(param, click.Argument):
            arguments += map(_text, _listed(value))
        elif isinstance(param, click.Option) and param.is_flag:
            if value:
                yield max(param.opts, key=len)
        else:
            name = max(param.opts, key=len)
            for each in _listed(value):
                yield f"{name}={_text(each)}"
    yield from ("--", *arguments) if arguments else ()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)
