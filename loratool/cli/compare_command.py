"""``loratool compare``."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli import options, render
from loratool.verbs.compare import compare

__all__ = ["command"]


@click.command("compare")
@click.argument("adapters", type=options.PATH, nargs=-1, required=True, metavar="ADAPTER...")
@options.weights
@click.option("--modules", is_flag=True, help="One row for each module, nothing folded.")
@click.option(
    "--directions",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    metavar="N",
    help="How many leading singular directions to tabulate.",
)
@options.plot
@options.force
@options.alpha
@options.adapter_name
@options.base
@options.device
@options.threads
@options.no_progress
@options.as_json
@options.debug
def command(
    adapters: tuple[Path, ...],
    weights: tuple[str, ...],
    modules: bool,
    directions: int,
    plot: Path | None,
    force: bool,
    alpha: float | None,
    adapter_name: str | None,
    base: Path | None,
    device: str,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say how alike adapters are: cosine, distance and subspaces of their deltas.

    Two adapters are compared module by module; of more, each two as a whole. Nothing as large
    as a weight is ever formed.

    \b
    Example:
        loratool compare epoch-1/ epoch-2/
        loratool compare epoch-1/ epoch-2/ -w self_attn=0
        loratool compare a/ b/ c/ d/ --plot cosines.svg
    """
    if plot is not None:
        from loratool.cli.plots import check_plot

        check_plot(plot, force=force, inputs=adapters)
    with render.progress_bar("comparing", quiet=quiet) as progress:
        found = compare(
            adapters,
            weights=weights,
            directions=directions,
            alpha=alpha,
            adapter_name=adapter_name,
            base=base,
            device=device,
            threads=threads,
            progress=progress,
        )
    if plot is not None:
        from loratool.cli.plots import plot_comparison

        plot_comparison(found, plot, force=force)
    if as_json:
        render.print_json(found.as_json())
        return
    render.show(found.document(unfolded=modules))
