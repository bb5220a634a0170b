"""``loratool inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand
from loratool.errors import OptionError
from loratool.files.places import located
from loratool.verbs.inspect import AdapterInfo, inspect, inspect_many, is_adapter

__all__ = ["command"]


@click.command("inspect", cls=GroupedCommand)
@click.argument("paths", type=options.PATH, nargs=-1, required=True, metavar="PATH...")
@options.recursive
@click.option("--modules", is_flag=True, help="One row for each module, nothing folded.")
@click.option("--spectrum", is_flag=True, help="Read the factors too: singular values, norms.")
@click.option("--hashes", is_flag=True, help="Read the files too: AutoV1, AutoV2, AutoV3, SHA-256.")
@click.option(
    "--duplicates", is_flag=True, help="Say which adapters have the same content, by its values."
)
@options.sort
@options.plot
@options.report
@options.force
@options.adapter_name
@options.threads
@options.quiet
@options.as_json
@options.as_jsonl
@options.as_csv
@options.debug
def command(
    paths: tuple[Path, ...],
    recursive: bool,
    modules: bool,
    spectrum: bool,
    hashes: bool,
    duplicates: bool,
    sort: str | None,
    plot: Path | None,
    report: Path | None,
    force: bool,
    adapter_name: str | None,
    threads: int | None,
    quiet: bool,
    as_json: bool,
    as_jsonl: bool,
    as_csv: bool,
) -> int:
    """Say what an adapter (or a model) is, or many of them at one look.

    Only headers are read, so this is quick for files of any size. --spectrum reads the factors
    of an adapter as well, --plot draws their spectra, and --report makes a page of all of it.
    Several paths, and folders of adapters, are a row each; a path that cannot be read has one
    too, and makes the exit status 1.

    \b
    Example:
        loratool inspect my-adapter/
        loratool inspect my-adapter/ --spectrum --plot spectra.png
        loratool inspect adapter_model.safetensors --json | jq '.modules[0]'
        loratool inspect loras/ --recursive --sort -size --duplicates
        loratool inspect loras/ --csv > loras.csv
    """
    if plot is not None or report is not None:
        from loratool.cli.drawings import check_drawings

        check_drawings(plot, report, force=force, inputs=paths)
    of_modules = len(paths) == 1 and (modules or spectrum)
    is_many = options.are_many(
        paths,
        recursive=recursive,
        adapter_name=adapter_name,
        asks_for_rows=sort is not None or duplicates or (as_csv and not of_modules),
    )
    if is_many:
        from loratool.cli.many import tell

        _check_alone(modules=modules, plot=plot is not None)
        found = inspect_many(
            paths,
            recursive=recursive,
            duplicates=duplicates,
            spectrum=spectrum,
            hashes=hashes,
            adapter_name=adapter_name,
            threads=threads,
        )
        if report is not None:
            from loratool.cli.drawings import write_drawings

            write_drawings(found, None, report, force=force)
        return tell(
            found, as_json=as_json, as_jsonl=as_jsonl, as_csv=as_csv, sort=sort, quiet=quiet
        )
    (path,) = paths
    place = located(path)
    has_spectrum = report is not None and place.exists() and is_adapter(place)
    reads = spectrum or plot is not None or has_spectrum
    with render.progress_bar("reading", quiet=quiet or not reads) as progress:
        info = inspect(
            path,
            spectrum=reads,
            hashes=hashes,
            adapter_name=adapter_name,
            threads=threads,
            progress=progress,
        )
    if plot is not None or report is not None:
        from loratool.cli.drawings import write_drawings

        write_drawings(info, plot, report, force=force)
    if as_csv and isinstance(info, AdapterInfo):
        render.print_csv(info.records())
    elif as_jsonl:
        click.echo(json.dumps(info.as_json()))
    elif as_json:
        render.print_json(info.as_json())
    elif isinstance(info, AdapterInfo):
        render.show(info.document(unfolded=modules))
    else:
        render.show(info.document())
    return 0


def _check_alone(**asked: bool) -> None:
    for name, is_asked in asked.items():
        if is_asked:
            raise OptionError(f"--{name}", "is about one path", hint="name one adapter")
