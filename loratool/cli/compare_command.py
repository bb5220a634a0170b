"""``loratool compare``."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli import options, render
from loratool.cli.folding import fold_names
from loratool.cli.grouping import group_modules, span
from loratool.cli.help import GroupedCommand
from loratool.errors import printable
from loratool.verbs.compare import Comparison, compare

__all__ = ["command"]


@click.command("compare", cls=GroupedCommand)
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
    render.print_notes(found.notes)
    if len(found.adapters) == 2:
        _print_pair(found, unfolded=modules)
    else:
        _print_matrix(found)


def _print_pair(found: Comparison, *, unfolded: bool) -> None:
    names = [module.module for module in found.modules]
    groups = (
        [((module.module,), [module]) for module in found.modules]
        if unfolded
        else group_modules(found.modules, names)
    )
    render.print_table(
        "",
        ("modules", "count", "cosine", "relative distance", "subspaces", "‖first‖", "‖second‖"),
        [
            (
                folded,
                len(members),
                span((m.cosine for m in members if m.cosine is not None), ".4f"),
                span(m.relative_distance for m in members if m.relative_distance is not None),
                span(
                    (m.subspace_similarity for m in members if m.subspace_similarity is not None),
                    ".3f",
                ),
                span(m.norms[0] for m in members),
                span(m.norms[1] for m in members),
            )
            for folded, members in groups
        ],
    )
    _print_alone(found)
    click.echo(
        f"cosine {_number(found.cosine, '.6f')}, relative distance "
        f"{_number(found.relative_distance, '.4g')}, norms "
        f"{found.norms[0]:.4g} and {found.norms[1]:.4g}"
    )


def _print_matrix(found: Comparison) -> None:
    letters = [str(index + 1) for index in range(len(found.adapters))]
    render.print_table(
        "cosines",
        ("", "adapter", *letters),
        [
            (letter, path, *(_number(value, ".4f") for value in row))
            for letter, path, row in zip(letters, found.adapters, found.cosines, strict=True)
        ],
    )
    _print_alone(found)


def _print_alone(found: Comparison) -> None:
    for path, names in zip(found.adapters, found.only_in, strict=True):
        if names:
            shown = ", ".join(printable(name) for name in fold_names(names)[:4])
            click.echo(f"not in all: {len(names)} modules of {printable(path)}: {shown}", err=True)


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
