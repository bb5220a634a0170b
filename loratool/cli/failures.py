"""What a person and a script are told when a command fails, and the exit status that says it."""

from __future__ import annotations

import errno
import json
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import click

from loratool.display.characters import writable
from loratool.errors import LoratoolError, OptionError, spoken

__all__ = ["FAILURE", "Failure", "failure_of", "stopped_by", "tell"]

FAILURE: Final = 2
LONGEST_MESSAGE: Final = 2000
NO_THREAD: Final = "can't start new thread"
NO_MEMORY: Final = ("OutOfMemoryError", "out of memory")
"""What PyTorch calls it: the name of a class, or words in a RuntimeError."""
PROGRAM: Final = "loratool"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a command ends without having done what it should.

    Attributes:
        code: One that ``docs/findings.md`` explains.
        where: File, tensor, module or command.
        what: What was found, and what was expected.
        hint: The next step, or ``None``.
        status: The exit status.
    """

    code: str
    where: str
    what: str
    hint: str | None = None
    status: int = FAILURE


def failure_of(error: BaseException) -> Failure:
    """Return what there is to say of an error.

    Args:
        error: What came out of a command; a bug, if it is nothing that is known.
    """
    if isinstance(error, LoratoolError):
        return Failure(error.code, error.where, error.what, error.hint)
    if isinstance(error, click.Abort):
        return stopped_by(signal.SIGINT)
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        where = context.command_path if context else PROGRAM
        what = error.format_message().rstrip(".")
        hint = getattr(error, "hint", None) or f"{where} --help"
        return Failure(OptionError.code, where, what, hint)
    if isinstance(error, MemoryError) or _is_of_torch(error):
        hint = "close other programs, or use --threads 1"
        if not isinstance(error, MemoryError):
            hint = "use --device cpu, or close what else uses the GPU"
        return Failure("LT320", PROGRAM, "out of memory", hint)
    if isinstance(error, OSError):
        where = str(error.filename or "standard output")
        return Failure("LT324", where, str(error.strerror or error), _system_hint(error))
    if isinstance(error, RuntimeError) and NO_THREAD in str(error):
        return Failure("LT321", PROGRAM, "no more threads are allowed here", "use --threads 1")
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith(PROGRAM):
        return Failure(
            "LT324",
            PROGRAM,
            f"needs the package {error.name}, which is not installed",
            f"pip install {str(error.name).partition('.')[0]}",
        )
    what = f"{type(error).__name__}: {error}".partition("\n")[0]
    hint = "run again with --debug and report what it prints"
    return Failure("LT399", PROGRAM, f"{what} (a bug)", hint)


def _is_of_torch(error: BaseException) -> bool:
    """Whether a GPU has no more memory."""
    name, words = NO_MEMORY
    is_runtime = isinstance(error, RuntimeError)
    return is_runtime and (type(error).__name__ == name or words in str(error))


def _system_hint(error: OSError) -> str | None:
    """Return what helps where the system refuses something."""
    if error.errno == errno.ENOSPC:
        return "free some space, or choose another disk"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "allow more open files: ulimit -n 4096"
    return None


def stopped_by(number: int) -> Failure:
    """Return what there is to say of a signal."""
    is_interrupt = number == signal.SIGINT
    code, word = ("LT322", "interrupted") if is_interrupt else ("LT323", "terminated")
    return Failure(code, PROGRAM, f"{word}; nothing was written", None, 128 + number)


def tell(failure: Failure, *, as_json: bool, debug: bool) -> int:
    """Say why a command failed, and return the exit status.

    Args:
        failure: What to say.
        as_json: Whether a script reads standard output, which gets a document then.
        debug: Whether to show where in the code it was.
    """
    with suppress(OSError):  # nobody may be there to read it
        if debug:
            traceback.print_exc()
        what = failure.what
        if len(what) > LONGEST_MESSAGE:
            what = f"{what[:LONGEST_MESSAGE]}…"
        clean = writable(sys.stderr.encoding)
        click.echo(f"error: {clean(failure.where)}: {clean(what)}", err=True)
        if failure.hint:
            click.echo(f"hint: {clean(failure.hint)}", err=True)
    if as_json:
        with suppress(OSError):
            told = {
                "code": failure.code,
                "where": failure.where,
                "message": failure.what,
                "hint": failure.hint,
            }
            click.echo(spoken(json.dumps({"schema": 1, "error": told})))
    return failure.status
