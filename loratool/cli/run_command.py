"""``loratool run``."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand
from loratool.errors import printable

__all__ = ["command"]


@click.command("run", cls=GroupedCommand)
@click.argument("recipe", type=options.PATH)
@click.option(
    "--into", type=options.PATH, metavar="FOLDER", help="Where relative outputs go instead."
)
@click.option(
    "--outside",
    is_flag=True,
    help="Let it write elsewhere than in and below the recipe's folder, or FOLDER.",
)
@options.force
@options.dry_run
@options.quiet
@options.as_json
@options.debug
def command(
    recipe: Path,
    into: Path | None,
    outside: bool,
    force: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Carry out a recipe: commands in a TOML file, one after the other.

    Each step names a command as 'verb', and its arguments and options as on the command line.
    Relative paths begin where the recipe lies; a later step may read what an earlier one writes.
    Outputs lie in or below that folder, unless --into or --outside says otherwise.
    'loratool recipe OUT' prints the recipe that made OUT. '-' reads standard input.

    \b
    Example:
        loratool run merge.toml
        loratool run merge.toml --dry-run
        loratool recipe merged/ | loratool run - --into again/
    """
    from loratool.jobs.run import run

    def announce(number: int, count: int, verb: str) -> None:
        if count > 1 and not quiet:
            click.echo(f"step {number} of {count}: {printable(verb)}", err=True)

    report = run(
        recipe,
        into=into,
        outside=outside,
        force=force,
        dry_run=dry_run,
        as_json=as_json,
        quiet=quiet,
        on_step=announce,
    )
    if as_json:
        render.print_json(report.as_json())
    else:
        render.show(report.document(), quiet=quiet)
    return report.status
