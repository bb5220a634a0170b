"""``loratool merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand
from loratool.cli.named import choice

__all__ = ["command"]


@click.command("merge", cls=GroupedCommand)
@click.argument("paths", type=options.PATH, nargs=-1, required=True, metavar="[BASE] ADAPTER...")
@options.output
@options.weights
@options.dtype
@options.alpha
@options.adapter_name
@options.skip
@options.enable_lora
@click.option("--allow-nonfinite", is_flag=True, help="Write NaN and infinity where they come out.")
@options.no_card
@options.force
@click.option(
    "--quantized",
    type=choice("what", "loratool.verbs.merging.coding:QUANTIZED"),
    default="dequantize",
    show_default=True,
    help="What becomes of quantised weights: plain numbers, or codes again.",
)
@options.dry_run
@options.shards
@options.finish
@options.wait
@click.option(
    "--resume", is_flag=True, help="Keep what is done if it is interrupted; go on with it."
)
@options.executor
@click.option("--sync", is_flag=True, help="Wait until everything is on the disk itself.")
@options.device
@options.threads
@options.quiet
@options.as_json
@options.debug
def command(
    paths: tuple[Path, ...],
    output: Path,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Fold adapters into a base: W + Σ weight · delta, written as a checkpoint like the base.

    The base may be larger than memory: it is streamed in small blocks, summed in float32 and
    rounded once. Everything that no adapter touches is copied byte for byte. A single path is an
    adapter, and the base is the model that it records.

    \b
    Example:
        loratool merge TinyLlama-1.1B/ my-adapter/ -o merged/
        loratool merge base/ style/ tone/ -w 0.7 -w -0.2 -o merged/
        loratool merge sdxl/ style.safetensors -w te1=0.5 -w unet=1.1 -o merged/
        loratool merge base/ my-adapter/ -o merged/ --shards 3/8   (one of eight workers)
        loratool merge base/ my-adapter/ -o merged/ --finish       (when all are done)
    """
    from loratool.shards.course import ShareReport
    from loratool.verbs.merge import merge

    base, adapters = (paths[0], paths[1:]) if len(paths) > 1 else (None, paths)
    with render.progress_bar("merging", quiet=quiet) as progress:
        report = merge(base, adapters, output, progress=progress, **settings)
    if as_json:
        render.print_json(report.as_json())
        return
    render.show(
        report.document(), quiet=quiet and (isinstance(report, ShareReport) or report.is_written)
    )
