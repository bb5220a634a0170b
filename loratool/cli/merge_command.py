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
@click.argument("base", type=options.PATH)
@click.argument("adapters", type=options.PATH, nargs=-1, required=True, metavar="ADAPTER...")
@options.output
@options.weights
@options.dtype
@options.alpha
@options.adapter_name
@options.skip
@options.enable_lora
@click.option("--allow-nonfinite", is_flag=True, help="Write NaN and infinity where they come out.")
@options.force
@click.option(
    "--quantized",
    type=choice("what", "loratool.verbs.merging.coding:QUANTIZED"),
    default="dequantize",
    show_default=True,
    help="What becomes of quantised weights: plain numbers, or codes again.",
)
@options.dry_run
@click.option("--sync", is_flag=True, help="Wait until everything is on the disk itself.")
@options.device
@options.threads
@options.quiet
@options.as_json
@options.debug
def command(
    base: Path,
    adapters: tuple[Path, ...],
    output: Path,
    weights: tuple[str, ...],
    dtype: str | None,
    alpha: float | None,
    adapter_name: str | None,
    skip: tuple[str, ...],
    enable_lora: tuple[bool, ...],
    quantized: str,
    allow_nonfinite: bool,
    force: bool,
    dry_run: bool,
    sync: bool,
    device: str,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Fold adapters into a base: W + Σ weight · delta, written as a checkpoint like the base.

    The base may be larger than memory: it is streamed in small blocks, summed in float32 and
    rounded once. Everything that no adapter touches is copied byte for byte.

    \b
    Example:
        loratool merge TinyLlama-1.1B/ my-adapter/ -o merged/
        loratool merge base/ style/ tone/ -w 0.7 -w -0.2 -o merged/
        loratool merge sdxl.safetensors style.safetensors -w te1=0.5 -w unet=1.1 -o out.safetensors
    """
    from loratool.verbs.merge import merge, plan_merge

    settings: dict[str, Any] = {
        "weights": weights,
        "dtype": dtype,
        "alpha": alpha,
        "adapter_name": adapter_name,
        "skip": skip,
        "enable_lora": enable_lora,
        "quantized": quantized,
    }
    if dry_run:
        plan = plan_merge(base, adapters, output=output, **settings)
        if as_json:
            render.print_json(plan.as_json())
        else:
            render.show(plan.document())
        return
    with render.progress_bar("merging", quiet=quiet) as progress:
        report = merge(
            base,
            adapters,
            output,
            **settings,
            force=force,
            allow_nonfinite=allow_nonfinite,
            device=device,
            threads=threads,
            sync=sync,
            progress=progress,
        )
    if as_json:
        render.print_json(report.as_json())
        return
    render.show(report.document(), quiet=quiet)
