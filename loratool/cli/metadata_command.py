"""``loratool metadata``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand
from loratool.errors import FileFormatError, OptionError, printable

__all__ = ["command"]

FROM_FILE: Final = "@"
FROM_STDIN: Final = "-"
LARGEST: Final = 64 << 20


def _pairs(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in value:
        key, equals, said = text.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"'{printable(text)}'; expected KEY=VALUE")
        if key in found:
            raise click.BadParameter(f"'{printable(key)}' is given twice")
        found[key] = _read(said)
    return found


def _read(text: str) -> str:
    """Return a value, or what the file holds that it names."""
    if text == FROM_STDIN:
        return sys.stdin.read()
    if not text.startswith(FROM_FILE):
        return text
    if text.startswith(2 * FROM_FILE):
        return text[1:]
    path = Path(text[1:])
    try:
        if path.stat().st_size > LARGEST:
            raise OptionError("--set", f"{path} is larger than {LARGEST >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileFormatError(path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FileFormatError(path, "not UTF-8 text, as metadata are") from None


@click.command("metadata", cls=GroupedCommand)
@click.argument("path", type=options.PATH)
@click.option(
    "--set",
    "set_",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_pairs,
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
    set_: dict[str, str],
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
        set=set_,
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
