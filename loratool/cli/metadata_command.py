"""``loratool metadata``."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand
from loratool.cli.pair import Pair

__all__ = ["command"]


@click.command("metadata", cls=GroupedCommand)
@click.argument("path", type=options.PATH)
@click.option(
    "--set",
    "set_",
    multiple=True,
    type=Pair(),
    metavar="KEY=VALUE",
    help="Say this; VALUE may be @FILE, or - for standard input (@@ for an @).",
)
@click.option("--remove", multiple=True, metavar="KEY", help="Say nothing under this key.")
@click.option(
    "--from",
    "source",
    type=options.PATH,
    metavar="OTHER",
    help="Take over what OTHER says, but for what is true of its tensors alone.",
)
@click.option(
    "-o", "--output", type=options.PATH, help="Where the result goes; of a folder a folder."
)
@click.option("--in-place", is_flag=True, help="Change PATH itself, in one rename.")
@options.force
@options.dry_run
@options.quiet
@options.as_json
@options.debug
def command(
    path: Path,
    set_: tuple[str, ...],
    remove: tuple[str, ...],
    source: Path | None,
    output: Path | None,
    in_place: bool,
    force: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Show what a file says of itself, or change it; tensors keep their bytes.

    --from comes first, then --remove, then --set. Of a folder it is the weights that are meant;
    configurations beside them stay as they are. Hashes of the tensors that a file records
    (sshs_model_hash, sshs_legacy_hash) stay right. Images are shown as what they are; --json has
    every value whole.

    \b
    Example:
        loratool metadata style.safetensors
        loratool metadata style.safetensors --set modelspec.author=me --in-place
        loratool metadata style.safetensors --remove ss_dataset_dirs -o public.safetensors
        loratool metadata small.safetensors --from style.safetensors --in-place --dry-run
    """
    from loratool.verbs.metadata import metadata

    report = metadata(
        path,
        output,
        set=Pair.read(set_),
        remove=remove,
        source=source,
        in_place=in_place,
        force=force,
        dry_run=dry_run,
    )
    if as_json:
        render.print_json(report.as_json())
        return
    render.show(report.document(), quiet=quiet and report.output is not None)
