"""``loratool recipe``."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand

__all__ = ["command"]


@click.command("recipe", cls=GroupedCommand)
@click.argument("path", type=options.PATH, metavar="OUT")
@options.quiet
@options.as_json
@options.debug
def command(path: Path, quiet: bool, as_json: bool) -> None:
    """Print the recipe that made OUT, which 'loratool run' carries out again.

    What loratool writes records the command, its options, and its inputs by name and SHA-256.
    Inputs are looked for by name, here and beside OUT, and written as paths where they are found
    and their digests are the recorded ones.

    \b
    Example:
        loratool recipe merged/
        loratool recipe merged/ > merge.toml
    """
    from loratool.jobs.recorded import recipe

    found = recipe(path)
    if as_json:
        render.print_json(found.as_json())
    else:
        click.echo(found.toml, nl=False)
