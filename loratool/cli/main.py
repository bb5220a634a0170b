"""The entry point: commands loaded when they are called, errors as one line, exit statuses."""

from __future__ import annotations

import codecs
import gc
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from loratool.cli.failures import FAILURE, failure_of, stopped_by, tell
from loratool.cli.help import help_of, no_such_option, summary_of
from loratool.cli.synonyms import no_such_command
from loratool.display.characters import ASCII, is_unicode
from loratool.errors import LoratoolError, printable
from loratool.files.sources import Fetching, listeners

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

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
    "metadata",
    "recipe",
    "run",
    "batch",
    "status",
    "schemes",
    "completion",
)
COMPLETING: Final = "_LORATOOL_COMPLETE"
"""Set by a shell that wants to know how a line may go on."""
BLAS_THREADS: Final = ("OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""How the BLAS libraries that numpy comes with are told; PyTorch on a processor has another."""
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

    def get_help(self, ctx: click.Context) -> str:
        return help_of(self, ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise no_such_command(args, COMMANDS, ctx)
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            own = [name for option in self.get_params(ctx) for name in option.opts]
            what = no_such_option(error.option_name, own)
            if what.endswith(error.option_name):
                what += ": options go behind the command"
            raise click.UsageError(what, ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their first sentences whole, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(name)) for name in COMMANDS])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands that a word may become; nothing is imported for it."""
        from click.shell_completion import CompletionItem

        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        names = [name for name in COMMANDS if name.startswith(incomplete)]
        return [CompletionItem(name, help=_summary(name)) for name in names]


def _summary(name: str) -> str:
    """Return what a command does, in its own words."""
    from pkgutil import get_data

    source = get_data("loratool.cli", f"{name}_command.py")
    assert source is not None
    return summary_of(source.decode())


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from loratool.cli.about import version_lines

        for line in version_lines(is_verbose=ctx.meta.get("verbose", False)):
            click.echo(line)
        ctx.exit()


def _note_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta["verbose"] = value


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every command has --help with an example. Tab completion: loratool completion --help.",
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    callback=_show_version,
    help="Say which version this is, and exit.",
)
@click.option(
    "--verbose",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_note_verbose,
    help="With --version: BLAS, PyTorch, GPU and extras too.",
)
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
    if COMPLETING in os.environ:
        import loratool.cli.completion  # noqa: F401 - how each shell is answered
    arguments = sys.argv[1:] if args is None else args
    _follow_fetching(is_quiet=bool({"-q", "--quiet"} & set(arguments)))
    debug = "--debug" in arguments
    status = _run([argument for argument in arguments if argument != "--debug"], debug=debug)
    if "loratool.files.places" in sys.modules:
        sys.modules["loratool.files.places"].forget_stand_ins()
    if "loratool.engines.mpi" in sys.modules:
        sys.modules["loratool.engines.mpi"].leave(status)
    if "torch" in sys.modules:
        # Taking torch down takes a while, and aborts now and then after an interruption. All
        # outputs are renamed and closed by now.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _follow_fetching(*, is_quiet: bool) -> None:
    """Say what is fetched from elsewhere before it is, and leave the rest to the progress bars.

    The hub's own library is told through the environment, which it reads when it is imported.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if is_quiet or sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not is_quiet:
        listeners.append(_say_fetching)


def _say_fetching(fetching: Fetching) -> None:
    from loratool.display.figures import human_bytes

    files = f"{fetching.files} file{'s' * (fetching.files != 1)}"
    size = human_bytes(fetching.size)
    text = f"fetching {files}, {size}, of {fetching.name} into {fetching.folder}"
    print(printable(text), file=sys.stderr, flush=True)


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
    as_json = bool({"--json", "--jsonl"} & set(arguments))
    try:
        status = cli.main(arguments, prog_name="loratool", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except _StoppedError as stopped:
        return tell(stopped_by(stopped.number), as_json=as_json, debug=debug)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return FAILURE
    except SystemExit as error:  # how click leaves where a pipe is broken
        if error.code == 1:
            _drop_output()
            return FAILURE
        return int(error.code or 0)
    except BrokenPipeError:
        _drop_output()
        return FAILURE
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None:
            _drop_output()  # what could not be written is not to be tried again at the end
        is_known = isinstance(error, LoratoolError | click.ClickException)
        failure = stopped_by(_stopped[0].number) if _stopped and not is_known else failure_of(error)
        return tell(failure, as_json=as_json, debug=debug)


def _drop_output() -> None:
    """Send what is left in the buffer of standard output nowhere: nobody can take it."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
