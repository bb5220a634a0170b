"""``loratool extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratool.cli import options, render
from loratool.cli.folding import fold_names
from loratool.cli.grouping import group_modules, span
from loratool.errors import printable
from loratool.files.places import called
from loratool.verbs.extract import METHODS, RESIDUALS, VARIANTS, extract
from loratool.verbs.extraction.result import ExtractReport

__all__ = ["command"]

LISTED = 8


@click.command("extract")
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
    type=click.Choice(RESIDUALS),
    default="report",
    show_default=True,
    help="Changed norms, biases and rows: only report them, or carry them whole.",
)
@click.option(
    "--variant",
    type=click.Choice(VARIANTS),
    default="lora",
    show_default=True,
    help="dora: with a length for every row, for models whose weights were scaled too.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
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
@options.dtype
@options.force
@options.dry_run
@click.option("--resume", is_flag=True, help="Keep finished modules; take up those of before.")
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
    if plot is not None:
        from loratool.cli.plots import check_plot

        check_plot(plot, force=settings["force"], inputs=[base, finetuned, output])
    with render.progress_bar("extracting", quiet=quiet) as progress:
        report = extract(base, finetuned, output, progress=progress, **settings)
    if plot is not None and report.is_written:
        from loratool.cli.plots import plot_extraction

        plot_extraction(report, called(finetuned), plot, force=settings["force"])
    if as_json:
        render.print_json(report.as_json())
        return
    render.print_notes(report.notes)
    if not quiet:
        _print(report, output)


def _print(report: ExtractReport, output: Path) -> None:
    total = report.total_change or 1.0
    names = [module.module for module in report.modules]
    columns = ["modules", "count", "rank"]
    if report.is_written:
        columns += ["relative error", "‖difference‖", "share of the change"]
    rows = []
    for folded, members in group_modules(report.modules, names):
        row: list[object] = [folded, len(members), span((m.rank for m in members), "d")]
        if report.is_written:
            row += [
                span(m.relative_error for m in members),
                span(m.squared_norm**0.5 for m in members),
                f"{sum(m.squared_norm for m in members) / total:.2%}",
            ]
        rows.append(row)
    render.print_table("" if report.is_written else "would be extracted", columns, rows)
    _print_leftovers(report, total)
    for name, why in report.plan.dropped[:LISTED]:
        click.echo(f"not written: {printable(name)}: {why}", err=True)
    size = render.human_bytes(report.plan.nbytes)
    if report.is_written:
        click.echo(
            f"{printable(output)}: {len(report.plan.parts)} modules, {size}, relative error "
            f"{report.relative_error:.3g}; {report.captured:.2%} of the change"
            + ("" if report.device == "cpu" else f"; computed on {printable(report.device)}")
        )
    else:
        seconds = report.seconds or 0.0
        words = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
        memory = render.human_bytes(report.peak_memory)
        if report.gpu_memory is not None:
            memory += f", {render.human_bytes(report.gpu_memory)} of {printable(report.device)}"
        click.echo(
            f"dry run, nothing written; at most {size}, about {words} and {memory} of memory"
        )


def _print_leftovers(report: ExtractReport, total: float) -> None:
    groups: dict[tuple[str, bool], list[int]] = {}
    for index, item in enumerate(report.leftovers):
        groups.setdefault((item.why, item.is_carried), []).append(index)
    rows = []
    for (why, is_carried), places in groups.items():
        items = [report.leftovers[place] for place in places]
        known = [item.squared_change for item in items if item.squared_change is not None]
        folded = fold_names([item.name for item in items])
        shown = (
            (*folded[:LISTED], f"and {len(folded) - LISTED} more")
            if len(folded) > LISTED
            else tuple(folded)
        )
        share = f"{sum(known) / total:.2%}" if known and report.is_written else "-"
        rows.append((shown, len(items), why, "carried whole" if is_carried else "no", share))
    if rows:
        render.print_table(
            "not in the factors",
            ("tensors", "count", "why", "in the adapter", "share of the change"),
            rows,
        )
