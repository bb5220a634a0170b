"""``loratool extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratool.cli import options, render
from loratool.cli.drawings import check_drawings, write_drawings
from loratool.cli.help import GroupedCommand
from loratool.cli.named import choice

__all__ = ["command"]


@click.command("extract", cls=GroupedCommand)
@click.argument("base", type=options.PATH)
@click.argument("finetuned", type=options.PATH)
@options.output
@options.extraction
@click.option(
    "--include",
    multiple=True,
    metavar="RE",
    help="Only modules that match; glob:layers.0-11 for a pattern as of -w.",
)
@click.option(
    "--exclude", multiple=True, metavar="RE", help="No modules that match, in the same way."
)
@click.option("--embeddings", is_flag=True, help="Embeddings and the output head too.")
@click.option("--save-module", multiple=True, metavar="NAME", help="Save this module whole.")
@click.option(
    "--residual",
    type=choice("what", "loratool.verbs.extract:RESIDUALS"),
    default="report",
    show_default=True,
    help="Changed norms, biases and rows: only report them, or carry them whole.",
)
@click.option(
    "--variant",
    type=choice("variant", "loratool.verbs.extract:VARIANTS"),
    default="lora",
    show_default=True,
    help="dora: with a length for every row, for models whose weights were scaled too.",
)
@click.option(
    "--method",
    type=choice("method", "loratool.verbs.extract:METHODS"),
    default="auto",
    show_default=True,
    help="auto is exact for small matrices, randomised for large ones.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For the randomised method.")
@click.option(
    "--clamp-quantile", type=float, metavar="Q", help="Clamp factors as kohya does; it costs."
)
@click.option(
    "--save-spectrum", type=options.PATH, metavar="FILE", help="Keep the spectra, for truncate."
)
@options.to("The scheme to write; peft by default.")
@options.plot
@options.report
@options.dtype
@options.no_card
@options.force
@options.dry_run
@click.option("--resume", is_flag=True, help="Keep finished modules; take up those of before.")
@options.shards
@options.finish
@options.wait
@options.executor
@options.gpu_device
@options.all_threads
@options.quiet
@options.as_json
@options.debug
def command(
    base: Path,
    finetuned: Path,
    output: Path,
    plot: Path | None,
    report: Path | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Turn a finetuned model less its base into an adapter, with the error of every module.

    Both models are streamed, one weight at a time. Give one of --rank (a number, or auto),
    --energy, --max-error, --max-size or the --sv options.

    \b
    Example:
        loratool extract base/ finetuned/ --rank 16 -o adapter/
        loratool extract base/ finetuned/ --max-error 0.1 --rank 128 -o adapter/
        loratool extract base/ finetuned/ --rank auto --residual carry -o adapter/
        loratool extract base/ finetuned/ --rank 32 --variant dora -o adapter/
    """
    from loratool.verbs.extract import extract
    from loratool.verbs.extraction.result import ExtractReport

    force = settings["force"]
    check_drawings(plot, report, force=force, inputs=[base, finetuned, output])
    with render.progress_bar("extracting", quiet=quiet) as progress:
        found = extract(base, finetuned, output, progress=progress, **settings)
    is_done = not isinstance(found, ExtractReport) or found.is_written
    if isinstance(found, ExtractReport) and is_done:
        write_drawings(found, plot, report, force=force)
    if as_json:
        render.print_json(found.as_json())
        return
    render.show(found.document(), quiet=quiet and is_done)
