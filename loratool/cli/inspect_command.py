"""``loratool inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand
from loratool.verbs.inspect import AdapterInfo, inspect

__all__ = ["command"]


@click.command("inspect", cls=GroupedCommand)
@click.argument("path", type=options.PATH)
@click.option("--modules", is_flag=True, help="One row for each module, nothing folded.")
@click.option("--spectrum", is_flag=True, help="Read the factors too: singular values, norms.")
@options.plot
@options.report
@options.force
@options.adapter_name
@options.threads
@options.no_progress
@options.as_json
@options.debug
def command(
    path: Path,
    modules: bool,
    spectrum: bool,
    plot: Path | None,
    report: Path | None,
    force: bool,
    adapter_name: str | None,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say what an adapter (or a model) is.

    Only headers are read, so this is quick for files of any size. --spectrum reads the factors
    of an adapter as well, --plot draws their spectra, and --report makes a page of all of it.

    \b
    Example:
        loratool inspect my-adapter/
        loratool inspect my-adapter/ --spectrum --plot spectra.png
        loratool inspect adapter_model.safetensors --json | jq '.modules[0]'
    """
    reads = spectrum or plot is not None or report is not None
    if plot is not None or report is not None:
        from loratool.cli.drawings import check_drawings

        check_drawings(plot, report, force=force, inputs=[path])
    with render.progress_bar("reading", quiet=quiet or not reads) as progress:
        info = inspect(
            path,
            spectrum=reads,
            adapter_name=adapter_name,
            threads=threads,
            progress=progress,
        )
    if isinstance(info, AdapterInfo) and (plot is not None or report is not None):
        from loratool.cli.drawings import write_drawings

        write_drawings(info, plot, report, force=force)
    if as_json:
        render.print_json(info.as_json())
    elif isinstance(info, AdapterInfo):
        render.show(info.document(unfolded=modules))
    else:
        render.show(info.document())
