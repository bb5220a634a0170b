"""``loratool schemes``."""

from __future__ import annotations

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand
from loratool.verbs.schemes import schemes

__all__ = ["command"]


@click.command("schemes", cls=GroupedCommand)
@options.as_json
@options.debug
def command(as_json: bool) -> None:
    """List the key schemes, and whether each is read and written.

    \b
    Example:
        loratool schemes
    """
    found = schemes()
    if as_json:
        rows = [
            {"name": s.name, "reads": s.reads, "writes": s.writes, "example": s.example}
            for s in found
        ]
        render.print_json({"schema": 1, "schemes": rows})
        return
    words = {True: "yes", False: "not yet"}
    render.print_table(
        "",
        ("scheme", "read", "written", "who writes it", "example"),
        [(s.name, words[s.reads], words[s.writes], s.summary, s.example) for s in found],
    )
