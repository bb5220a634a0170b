"""``loratool schemes``."""

from __future__ import annotations

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand
from loratool.verbs.schemes import schemes

__all__ = ["command"]


@click.command("schemes", cls=GroupedCommand)
@options.quiet
@options.as_json
@options.debug
def command(quiet: bool, as_json: bool) -> None:
    """List the key schemes, and whether each is read and written.

    \b
    Example:
        loratool schemes
    """
    found = schemes()
    if as_json:
        render.print_json(found.as_json())
        return
    render.show(found.document())
