"""``loratool compose``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratool.cli import options, render
from loratool.cli.drawings import check_drawings, write_drawings
from loratool.cli.help import GroupedCommand
from loratool.cli.named import choice

__all__ = ["command"]


@click.command("compose", cls=GroupedCommand)
@click.argument("adapters", type=options.PATH, nargs=-1, required=True, metavar="ADAPTER...")
@options.output
@options.weights
@click.option(
    "--method",
    type=choice("method", "loratool.verbs.compose:METHODS"),
    default="linear",
    show_default=True,
    help="linear is the exact sum; docs/algebra.md says what the others are.",
)
@click.option(
    "--density",
    type=float,
    metavar="D",
    help="Share of elements that ties, dare, dare-ties, della and knots keep; 0.5.",
)
@click.option(
    "--epsilon",
    type=float,
    metavar="E",
    help="Window of della's drop probabilities; 0.1.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For dare, dare-ties, della.")
@click.option(
    "--extras",
    type=choice("policy", "loratool.verbs.algebra.extras:POLICIES"),
    default="error",
    show_default=True,
    help="Where adapters bring different heads, biases or token rows.",
)
@options.base
@options.truncation
@options.to("The scheme to write; as the inputs.")
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
    adapters: tuple[Path, ...],
    output: Path,
    plot: Path | None,
    report: Path | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write the exact weighted sum of the deltas of adapters, as one adapter.

    Ranks, scales, dtypes and targets may differ; weights may be negative. Without a truncation
    nothing is lost; with one (--rank, --energy, --max-error, --max-size) the result is the best
    approximation, and its error is told.

    \b
    Example:
        loratool compose style/ subject/ -w 0.8 -w 0.6 -o both/
        loratool compose tuned/ unwanted/ -w 1 -w -1 --rank 16 -o without/
        loratool compose early/ late/ -w 1:layers.16-31=0 -w 2:layers.0-15=0 -o halves/
    """
    from loratool.verbs.compose import compose

    force = settings["force"]
    check_drawings(plot, report, force=force, inputs=[*adapters, output])
    with render.progress_bar("composing", quiet=quiet) as progress:
        found = compose(adapters, output, progress=progress, **settings)
    if found.is_written:
        write_drawings(found, plot, report, force=force)
    if as_json:
        render.print_json(found.as_json())
        return
    render.show(found.document(), quiet=quiet and found.is_written)
