"""``loratool metadata``."""

from __future__ import annotations

import base64
import binascii
import re
import sys
from pathlib import Path
from typing import Final

import click

from loratool.cli import options, render
from loratool.errors import FileFormatError, OptionError, printable
from loratool.verbs.metadata import FileMetadata, MetadataReport, metadata

__all__ = ["command"]

LONGEST: Final = 160
"""Characters of a value that are shown."""
FROM_FILE: Final = "@"
FROM_STDIN: Final = "-"
LARGEST: Final = 64 << 20
DATA_URL: Final = re.compile(r"data:image/(?P<kind>[\w.+-]+);base64,")
IMAGES: Final = {"/9j/": "jpeg", "iVBORw0KGgo": "png", "UklGR": "webp", "R0lGOD": "gif"}
"""What images begin with in base64."""


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


@click.command("metadata")
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
    render.print_notes(report.notes)
    if report.output is None:
        for file in report.files:
            _print_said(file, is_one=len(report.files) == 1)
    elif not quiet:
        _print_changes(report)


def _print_said(file: FileMetadata, *, is_one: bool) -> None:
    if not file.metadata:
        click.echo(f"{printable(file.path)}: says nothing of itself")
        return
    rows = [(key, _shown(value)) for key, value in sorted(file.metadata.items())]
    render.print_table("" if is_one else printable(file.path.name), ("key", "value"), rows)


def _print_changes(report: MetadataReport) -> None:
    for file in report.files:
        rows = [
            (key, *("" if value is None else _shown(value) for value in (old, new)))
            for key, old, new in file.changed()
        ]
        title = "" if len(report.files) == 1 else printable(file.path.name)
        if rows:
            render.print_table(title, ("key", "before", "after"), rows)
    count = sum(1 for file in report.files for _ in file.changed())
    keys = f"{count} key{'s' * (count != 1)} changed"
    words = f"{printable(report.output)}: {keys}, tensors as they were"
    click.echo(words if report.is_written else f"dry run, nothing written; {words}")


def _shown(value: str) -> str:
    """Return a value as people see it: images by what they are, long texts by how they begin."""
    image = _image(value)
    if image is not None:
        return image
    if len(value) <= LONGEST:
        return value
    return f"{value[:LONGEST]}… ({len(value):,} characters)"


def _image(value: str) -> str | None:
    match = DATA_URL.match(value)
    data = value[match.end() :] if match is not None else value
    kind = match["kind"] if match is not None else None
    if kind is None and len(data) > LONGEST:
        kind = next((kind for start, kind in IMAGES.items() if data.startswith(start)), None)
    if kind is None:
        return None
    try:
        size = len(base64.b64decode(data, validate=True))
    except (binascii.Error, ValueError):
        size = len(data) * 3 // 4
    return f"image ({kind}), {render.human_bytes(size)}"
