"""``loratool rescale``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand
from loratool.cli.named import choice

__all__ = ["command"]


@click.command("rescale", cls=GroupedCommand)
@click.argument("adapter", type=options.PATH)
@options.output
@click.option("--scale", type=float, metavar="S", help="Multiply every delta by this.")
@options.weights
@click.option("--alpha", type=float, metavar="A", help="Set alpha of every module to this.")
@click.option(
    "--keep",
    type=choice("what", "loratool.verbs.rescale:KEEP"),
    default="factors",
    show_default=True,
    help="What --alpha leaves alone: with factors the delta changes, with delta B does.",
)
@click.option(
    "--max-norm", type=float, metavar="N", help="Scale a module down where ‖delta‖ is larger."
)
@click.option("--fold", is_flag=True, help="Put the scale into B; alpha becomes the rank.")
@click.option("--to-rslora", is_flag=True, help="Record the scale as alpha / √r.")
@click.option("--from-rslora", is_flag=True, help="Record the scale as alpha / r.")
@options.dtype
@options.adapter_name
@options.skip
@options.no_card
@options.force
@options.dry_run
@options.threads
@options.quiet
@options.as_json
@options.debug
def command(adapter: Path, output: Path, quiet: bool, as_json: bool, **settings: Any) -> None:
    """Multiply an adapter's delta, set its alpha, or record its scale in another way.

    Where a configuration records the scale only that changes, and the factors are copied byte
    for byte: --scale is exact, also through patterns and biases.

    \b
    Example:
        loratool rescale my-adapter/ --scale 0.7 -o softer/
        loratool rescale my-adapter/ -w layers.0-3=0.5 -w mlp=0 -o softer/
        loratool rescale my-adapter/ --fold -o folded/
        loratool rescale my-adapter/ --alpha 32 --keep delta -o same-delta/
    """
    from loratool.verbs.rescale import rescale

    with render.progress_bar("rescaling", quiet=quiet) as progress:
        report = rescale(adapter, output, progress=progress, **settings)
    if as_json:
        render.print_json(report.as_json())
        return
    render.show(report.document(), quiet=quiet and report.is_written)
