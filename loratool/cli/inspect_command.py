"""``loratool inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli import options, render
from loratool.verbs.inspect import AdapterInfo, inspect

__all__ = ["command"]


@click.command("inspect")
@click.argument("path", type=options.PATH)
@click.option("--modules", is_flag=True, help="One row for each module, nothing folded.")
@click.option("--spectrum", is_flag=True, help="Read the factors too: singular values, norms.")
@options.plot
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
    force: bool,
    adapter_name: str | None,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say what an adapter (or a model) is.

    Only headers are read, so this is quick for files of any size. --spectrum reads the factors
    of an adapter as well, and --plot draws their spectra.

    \b
    Example:
        loratool inspect my-adapter/
        loratool inspect my-adapter/ --spectrum --plot spectra.png
        loratool inspect adapter_model.safetensors --json | jq '.modules[0]'
    """
    if plot is not None:
        from loratool.cli.plots import check_plot

        check_plot(plot, force=force, inputs=[path])
    with render.progress_bar("reading", quiet=quiet or not (spectrum or plot)) as progress:
        info = inspect(
            path,
            spectrum=spectrum or plot is not None,
            adapter_name=adapter_name,
            threads=threads,
            progress=progress,
        )
    if plot is not None and isinstance(info, AdapterInfo):
        from loratool.cli.plots import plot_spectra

        plot_spectra(info.spectra, path.resolve().name, plot, force=force)
    if as_json:
        render.print_json(info.as_json())
    elif isinstance(info, AdapterInfo):
        render.show(info.document(unfolded=modules))
    else:
        render.show(info.document())
