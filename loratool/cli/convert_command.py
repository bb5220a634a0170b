"""``loratool convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand
from loratool.cli.named import COMPONENT, FAMILY, SCHEME, choice

__all__ = ["command"]


@click.command("convert", cls=GroupedCommand)
@click.argument("adapter", type=options.PATH)
@options.to("Scheme to write.")
@options.target("Write what this loader applies rightly.")
@options.output
@click.option("--from", "source", type=SCHEME, help="Scheme to read; else it is detected.")
@click.option(
    "--base",
    type=options.PATH,
    help="The model it is for: settles flattened names and kernels (headers only).",
)
@click.option(
    "--initial",
    type=options.PATH,
    help="The adapter before training, where its initialisation changed the base (PiSSA).",
)
@options.alpha
@options.adapter_name
@click.option("--name", metavar="N", help="The adapter's name in the output (prefixed).")
@click.option("--family", type=FAMILY, help="The pipeline, where names leave it open.")
@click.option(
    "--naming",
    type=choice("naming", "loratool.verbs.convert:NAMINGS"),
    help="Names of the backbone in kohya and comfy; by default the usual ones.",
)
@click.option("--component", type=COMPONENT, help="Write one component alone.")
@click.option("--to-lora", is_flag=True, help="Write LoHa, LoKr, DoRA and others as plain LoRA.")
@click.option(
    "--rank", type=options.Whole(1), metavar="R", help="Rank of what --to-lora approximates."
)
@click.option("--fold", is_flag=True, help="Multiply every scale into B.")
@click.option(
    "--pad", type=options.Whole(1), metavar="R", help="Fill every module to this rank with zeros."
)
@options.enable_lora
@options.dtype
@click.option(
    "--drop",
    multiple=True,
    metavar="RE",
    help="What may be left out where the scheme has no place for it; reported.",
)
@options.skip
@options.no_card
@options.force
@options.dry_run
@options.quiet
@options.as_json
@options.debug
def command(
    adapter: Path, to: str | None, output: Path, quiet: bool, as_json: bool, **settings: Any
) -> None:
    """Write the same deltas in another key scheme.

    Names, orientation and the place of the scale change; the delta of every module does not.
    What the scheme cannot express is an error that says so. OUTPUT is a folder, or a file for
    schemes without a configuration.

    \b
    Example:
        loratool convert style.safetensors --to diffusers -o style-diffusers.safetensors
        loratool convert mlx-adapter/ --to peft -o peft-adapter/
        loratool convert my-adapter/ --for vllm -o served/
        loratool convert loha.safetensors --to comfy --to-lora -o plain.safetensors
        loratool convert my-adapter/ --to kohya --dry-run -o out.safetensors
    """
    from loratool.verbs.convert import convert

    with render.progress_bar("converting", quiet=quiet) as progress:
        report = convert(adapter, to, output, progress=progress, **settings)
    if as_json:
        render.print_json(report.as_json())
        return
    render.show(report.document(), quiet=quiet and report.is_written)
