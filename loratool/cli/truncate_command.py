"""``loratool truncate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratool.cli import options, render
from loratool.cli.drawings import check_drawings, write_drawings
from loratool.cli.help import GroupedCommand

__all__ = ["command"]


@click.command("truncate", cls=GroupedCommand)
@click.argument("adapter", type=options.PATH)
@options.output
@options.truncation
@click.option(
    "--base",
    type=options.PATH,
    metavar="BASE",
    help="With --max-size: weigh errors relative to the base's own weights.",
)
@click.option(
    "--spectrum",
    type=options.PATH,
    metavar="FILE",
    help="From extract --save-spectrum: rules are about the whole difference.",
)
@options.plot
@options.report
@options.dtype
@options.alpha
@options.adapter_name
@options.skip
@options.no_card
@options.force
@options.dry_run
@options.device
@options.threads
@options.quiet
@options.as_json
@options.debug
def command(
    adapter: Path,
    output: Path,
    plot: Path | None,
    report: Path | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write the best approximation of an adapter at lower ranks, with the exact error.

    Each delta is decomposed through its factors, in milliseconds, without being formed. Give
    one of --rank, --energy, --max-error, --max-size or the --sv options; --rank may limit any
    of the others.

    \b
    Example:
        loratool truncate my-adapter/ --rank 16 -o smaller/
        loratool truncate my-adapter/ --max-error 0.05 --rank-multiple 8 -o smaller/
        loratool truncate my-adapter/ --max-size 8MB -o smaller/
    """
    from loratool.verbs.truncate import truncate

    force = settings["force"]
    check_drawings(plot, report, force=force, inputs=[adapter, output])
    with render.progress_bar("truncating", quiet=quiet) as progress:
        found = truncate(adapter, output, progress=progress, **settings)
    if found.is_written:
        write_drawings(found, plot, report, force=force)
    if as_json:
        render.print_json(found.as_json())
        return
    render.show(found.document(), quiet=quiet and found.is_written)
