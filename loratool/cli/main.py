"""The entry point: commands loaded when they are called, errors as one line, exit statuses."""

from __future__ import annotations

import codecs
import gc
import os
import signal
import sys
import traceback
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Final, NoReturn

import click

import loratool
from loratool.display.characters import ASCII, is_unicode
from loratool.errors import LoratoolError, printable

__all__ = ["cli", "main"]

COMMANDS: Final = (
    "inspect",
    "validate",
    "convert",
    "compare",
    "compose",
    "rescale",
    "truncate",
    "extract",
    "merge",
    "verify",
    "schemes",
)
FAILURE: Final = 2
BLAS_THREADS: Final = ("OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""How the BLAS libraries that numpy comes with are told; PyTorch on a processor has another."""
LONGEST_MESSAGE: Final = 2000
NO_THREAD: Final = "can't start new thread"
GARBAGE: Final = 100_000
"""Objects between two searches for cycles, of which a command makes none that matter."""


class LazyGroup(click.Group):
    """A group whose commands are imported only when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"loratool.cli.{cmd_name}_command").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            words = f"; did you mean '{near[0]}'?" if near else ""
            raise click.UsageError(f"no such command '{printable(args[0])}'{words}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every command has --help with an example. Tab completion: docs/cli.md.",
)
@click.version_option(loratool.__version__, prog_name="loratool", message="%(prog)s %(version)s")
def cli() -> None:
    """Inspect, check, convert, combine, shrink and merge LoRA adapters, file to file.

    No model code, no transformers, no GPU: adapters and bases are read as files, streamed in
    small blocks, and written whole or not at all.
    """


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _stop)
    _open_missing_streams()
    gc.set_threshold(GARBAGE)
    for variable in BLAS_THREADS:  # our threads each call it; to be set before numpy is loaded
        os.environ.setdefault(variable, "1")
    arguments = sys.argv[1:] if args is None else args
    debug = "--debug" in arguments
    status = _run([argument for argument in arguments if argument != "--debug"], debug=debug)
    if "torch" in sys.modules:
        # Taking torch down takes a while, and aborts now and then after an interruption. All
        # outputs are renamed and closed by now.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _open_missing_streams() -> None:
    """Give this process standard streams where whoever started it has closed them.

    Where they have fewer characters than are printed, others stand for these.
    """
    codecs.register_error("loratool", _in_fewer_characters)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - open till the end
        elif isinstance(stream, TextIOWrapper) and not is_unicode(stream.encoding):
            stream.reconfigure(errors="loratool")


def _in_fewer_characters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    plain = (ASCII.get(char) or char.encode("ascii", "backslashreplace").decode() for char in text)
    return "".join(plain), error.end


class _StoppedError(BaseException):
    """A signal. Not a KeyboardInterrupt, for which click would print a line of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_stopped: list[_StoppedError] = []
"""What was raised: Python's own code, such as that of imports, may wrap it in another error."""


def _stop(number: int, frame: Any) -> NoReturn:
    _stopped.append(_StoppedError(number))
    raise _stopped[-1]


def _run(arguments: list[str], *, debug: bool) -> int:
    _stopped.clear()
    try:
        status = cli.main(arguments, prog_name="loratool", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except _StoppedError as stopped:
        return _stopped_by(stopped.number, debug=debug)
    except click.Abort:
        return _fail(debug, "interrupted; nothing was written", None, 128 + signal.SIGINT)
    except LoratoolError as error:
        return _fail(debug, str(error), error.hint)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return FAILURE
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "loratool"
        return _fail(debug, f"{where}: {error.format_message().rstrip('.')}", f"{where} --help")
    except SystemExit as error:  # how click leaves where a pipe is broken
        return FAILURE if error.code == 1 else int(error.code or 0)
    except BrokenPipeError:
        # Whoever read the output has gone; what is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except OSError as error:
        return _fail(
            debug, f"{error.filename or 'standard output'}: {error.strerror or error}", None
        )
    except MemoryError:
        return _fail(debug, "loratool: out of memory", "close other programs, or use --threads 1")
    except Exception as error:  # the last resort of a command line
        if _stopped:
            return _stopped_by(_stopped[0].number, debug=debug)
        if NO_THREAD in str(error):
            return _fail(debug, "loratool: no more threads are allowed here", "use --threads 1")
        what = f"loratool: {type(error).__name__}: {error}".splitlines()[0]
        return _fail(debug, f"{what} (a bug)", "run again with --debug and report what it prints")


def _stopped_by(number: int, *, debug: bool) -> int:
    word = "interrupted" if number == signal.SIGINT else "terminated"
    return _fail(debug, f"{word}; nothing was written", None, 128 + number)


def _fail(debug: bool, message: str, hint: str | None, status: int = FAILURE) -> int:
    if debug:
        traceback.print_exc()
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]}…"
    print(f"error: {printable(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {printable(hint)}", file=sys.stderr)
    return status
