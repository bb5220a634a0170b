"""``loratool compare``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli import options, render
from loratool.cli.drawings import check_drawings, write_drawings
from loratool.cli.help import GroupedCommand
from loratool.errors import OptionError

if TYPE_CHECKING:
    from loratool.verbs.comparison.layers import LayerComparison
    from loratool.verbs.comparison.result import Comparison

__all__ = ["command"]


@click.command("compare", cls=GroupedCommand)
@click.argument("adapters", type=options.PATH, nargs=-1, required=True, metavar="ADAPTER...")
@options.recursive
@options.weights
@click.option("--modules", is_flag=True, help="One row for each module, nothing folded.")
@click.option("--layers", is_flag=True, help="Of one adapter: how alike its layers are.")
@click.option("--random", is_flag=True, help="One or two against random matrices.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random matrices.")
@click.option(
    "--directions",
    type=options.Whole(1),
    metavar="N",
    help="Singular directions to tabulate; by default 8, and 64 of the larger of unequal ranks.",
)
@options.plot
@options.report
@options.force
@options.alpha
@options.adapter_name
@options.base
@options.device
@options.threads
@options.quiet
@options.as_json
@options.as_jsonl
@options.as_csv
@options.debug
def command(
    adapters: tuple[Path, ...],
    modules: bool,
    layers: bool,
    random: bool,
    seed: int,
    plot: Path | None,
    report: Path | None,
    force: bool,
    quiet: bool,
    as_json: bool,
    as_jsonl: bool,
    as_csv: bool,
    **settings: Any,
) -> int:
    """Say how alike adapters are: cosine, distance and subspaces of their deltas.

    Two adapters are compared module by module; of more, or of a folder of them, each two as a
    whole, and the like are put side by side. Nothing as large as a weight is ever formed.

    \b
    Example:
        loratool compare epoch-1/ epoch-2/
        loratool compare epoch-1/ epoch-2/ -w self_attn=0
        loratool compare r8/ r64/ --random --plot phi.svg
        loratool compare loras/ --recursive --report alike.html
        loratool compare my-adapter/ --layers
    """
    check_drawings(plot, report, force=force, inputs=adapters, may_be_inside=True)
    with render.progress_bar("comparing", quiet=quiet) as progress:
        found = _found(adapters, layers, seed if random else None, progress, settings)
    write_drawings(found, plot, report, force=force)
    if as_json:
        render.print_json(found.as_json())
    elif as_jsonl:
        render.print_lines(found.lines())
    elif as_csv:
        render.print_csv(found.records())
    else:
        render.show(found.document(unfolded=modules))
    return 1 if found.unread else 0


def _found(
    adapters: Sequence[Path],
    layers: bool,
    random: int | None,
    progress: Callable[[int, int], None] | None,
    settings: dict[str, Any],
) -> Comparison | LayerComparison:
    """Compare adapters, or the layers of one.

    Raises:
        OptionError: The layers of several were asked for.
    """
    if not layers:
        from loratool.verbs.compare import compare

        return compare(adapters, random=random, progress=progress, **settings)
    if len(adapters) != 1:
        raise OptionError(
            "--layers", f"compares those of one adapter, and {len(adapters)} are given"
        )
    if settings.pop("recursive"):
        raise OptionError("--recursive", "--layers is about one adapter")
    if settings.pop("weights"):
        raise OptionError("--layers", "compares subspaces, which no weight changes")
    if random is not None:
        raise OptionError("--random", "--layers says already what chance makes")
    from loratool.verbs.comparison.layers import compare_layers

    return compare_layers(adapters[0], progress=progress, **settings)
