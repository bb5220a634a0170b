"""``loratool status``."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand

__all__ = ["command"]


@click.command("status", cls=GroupedCommand)
@click.argument("path", type=options.PATH, metavar="OUT")
@options.quiet
@options.as_json
@options.debug
def command(path: Path, quiet: bool, as_json: bool) -> None:
    """Say how far an output is that several workers make with --shards or --executor.

    It looks at the records in OUT.loratool-parts: what is done, what is at work and how far, what
    has failed, and how long the rest takes at the rate until now.

    \b
    Example:
        loratool status merged/
        loratool status merged/ --json | jq .seconds_left
    """
    from loratool.shards.status import status

    report = status(path)
    if as_json:
        render.print_json(report.as_json())
    else:
        render.show(report.document(), quiet=quiet and report.is_finished)
