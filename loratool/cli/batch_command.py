"""``loratool batch``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand
from loratool.errors import OptionError

if TYPE_CHECKING:
    from loratool.jobs.batch import JobRecord

__all__ = ["command"]

STDIN = "-"


@click.command("batch", cls=GroupedCommand)
@click.argument("jobs", type=options.PATH, metavar="JOBS.jsonl")
@click.option(
    "-o",
    "--output",
    type=options.PATH,
    metavar="RECORDS",
    help="Where the records go, a line of JSON each; by default JOBS.records.jsonl.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Processes here, as --executor processes:N; by default one for each processor.",
)
@options.executor
@click.option(
    "--resume", is_flag=True, help="Go on with RECORDS: what went well is not done again."
)
@options.force
@options.quiet
@options.as_json
@options.debug
def command(
    jobs: Path,
    output: Path | None,
    workers: int | None,
    executor: str | None,
    resume: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Carry out many commands in one pool of processes, with one record each.

    A line of JOBS.jsonl is {"command": ["inspect", "a", "--modules"]} or {"verb": "truncate",
    "adapter": "a", "rank": 4, "output": "b"}, with names as on the command line. Relative paths
    begin where the file lies; '-' reads standard input. A job whose process dies is tried again,
    three times at most. The exit status is 1 where some failed or found something wrong, 2 where
    nothing could be done.

    \b
    Example:
        loratool batch jobs.jsonl --workers 8
        loratool batch jobs.jsonl --resume
        loratool batch jobs.jsonl --executor dask://node1:8786
        mpiexec -n 64 loratool batch jobs.jsonl --executor mpi
        jq -c 'select(.status > 1) | [.job, .error.message]' jobs.records.jsonl
    """
    from loratool.jobs.batch import batch

    if output is None:
        if str(jobs) == STDIN:
            raise OptionError("--output", "say where the records go: the jobs are in no file")
        output = jobs.with_name(f"{jobs.stem}.records.jsonl")
    elif str(output) == STDIN:
        raise OptionError("--output", "records go to a file, which --resume reads again")
    with _progress(quiet=quiet) as note:
        report = batch(
            jobs,
            output,
            workers=workers,
            executor=executor,
            resume=resume,
            force=force,
            on_record=note,
        )
    if as_json:
        render.print_json(report.as_json())
    else:
        render.show(report.document(), quiet=quiet and not report.failures)
    return report.status


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[JobRecord, int], None]]:
    """Give what counts records on a terminal; where it is interrupted, say how to go on."""
    count = 0

    def note(record: JobRecord, total: int) -> None:
        nonlocal count
        count += 1
        if bar is not None:
            bar.update(task, completed=count, total=total)

    bar = None
    if not quiet and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task("jobs", total=None)
        bar.start()
    try:
        yield note
    except BaseException:
        if count:
            render.print_notes([f"{count} jobs are recorded; --resume goes on with the others"])
        raise
    finally:
        if bar is not None:
            bar.stop()
