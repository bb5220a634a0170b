"""``loratool merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratool.cli import options, render
from loratool.cli.folding import fold_names
from loratool.errors import printable
from loratool.plan.model import ModelPlan
from loratool.verbs.merge import MergeReport, merge, plan_merge
from loratool.verbs.merging.coding import QUANTIZED

__all__ = ["command"]


@click.command("merge")
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
    type=click.Choice(QUANTIZED),
    default=QUANTIZED[0],
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
            render.print_json(_plan_json(plan))
        else:
            _print_plan(plan)
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
        render.print_json(_report_json(report))
        return
    render.print_notes(report.notes)
    if not quiet:
        click.echo(_summary(report, output))


def _summary(report: MergeReport, output: Path) -> str:
    kept = ""
    if report.retention is not None:
        kept = f"; {min(report.retention, 1):.2%} of the update survived rounding"
    added = f", {report.added} added" if report.added else ""
    return (
        f"{printable(output)}: {report.merged} tensors merged, {report.copied} copied{added}, "
        f"{render.human_bytes(report.bytes_written)}{kept}"
    )


def _report_json(report: MergeReport) -> dict[str, Any]:
    return {
        "schema": 1,
        "tensors": report.tensors,
        "merged": report.merged,
        "copied": report.copied,
        "added": report.added,
        "unused": list(report.unused),
        "bytes_written": report.bytes_written,
        "retention": report.retention,
        "notes": list(report.notes),
    }


def _plan_json(plan: ModelPlan) -> dict[str, Any]:
    return {
        "schema": 1,
        "dry_run": True,
        "tensors": sum(1 for _ in plan.steps()),
        "merged": plan.merged,
        "copied": plan.copied,
        "added": plan.added,
        "unused": list(plan.unused),
        "bytes_to_write": plan.nbytes,
        "peak_memory": plan.peak_memory,
        "files": [{"name": file.name, "bytes": file.size} for file in plan.files],
        "steps": [
            {"tensor": step.spec.name, "what": step.words}
            for step in plan.steps()
            if step.is_changed
        ],
        "sidecars": [{"name": item.name, "why": item.why} for item in plan.others()],
        "left_behind": [{"name": name, "why": why} for name, why in plan.left_behind],
        "notes": list(plan.notes),
    }


def _print_plan(plan: ModelPlan) -> None:
    render.print_table(
        "would be written",
        ("file", "size", "tensors", "of these changed"),
        [
            (
                file.name,
                render.human_bytes(file.size),
                len(file.steps),
                sum(step.is_changed for step in file.steps),
            )
            for file in plan.files
        ]
        + [(item.name, "", "", item.why or "as it is") for item in plan.others()],
    )
    changed: dict[str, list[str]] = {}
    for step in plan.steps():
        if step.is_changed:
            changed.setdefault(step.words, []).append(step.spec.name)
    render.print_table(
        "changes",
        ("tensors", "count", "what happens"),
        [(tuple(fold_names(names)), len(names), words) for words, names in changed.items()],
    )
    if plan.left_behind:
        render.print_table("not carried over", ("file", "why"), plan.left_behind)
    for key in plan.unused:
        click.echo(f"skipped: {printable(key)}")
    click.echo(
        f"{render.human_bytes(plan.nbytes)} in all; about "
        f"{render.human_bytes(plan.peak_memory)} of memory; {plan.copied} tensors are copied"
    )
    render.print_notes(plan.notes)
