"""``loratool verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand

__all__ = ["command"]


@click.command("verify", cls=GroupedCommand)
@click.argument("merged", type=options.PATH)
@click.option(
    "--base",
    type=options.PATH,
    help="The model it was made from; by default as it or the adapter records.",
)
@click.option(
    "--adapter",
    "adapters",
    type=options.PATH,
    multiple=True,
    help="An adapter that was merged, once for each, in order; by default as it records.",
)
@options.weights
@options.alpha
@options.adapter_name
@options.skip
@options.enable_lora
@options.shards
@options.finish
@options.wait
@options.executor
@options.device
@options.threads
@options.quiet
@options.as_json
@options.debug
def command(
    merged: Path,
    base: Path | None,
    adapters: tuple[Path, ...],
    weights: tuple[str, ...],
    alpha: float | None,
    adapter_name: str | None,
    skip: tuple[str, ...],
    enable_lora: tuple[bool, ...],
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> int:
    """Prove that a merged model is what 'merge' should have written.

    Every tensor is computed again from base and adapters and compared; what no adapter touches
    must be equal byte for byte. The exit status is 1 where something differs. What 'merge' wrote
    records what it was made of: those files are looked for by name, here and beside MERGED, and
    taken where their digests are the recorded ones.

    \b
    Example:
        loratool verify merged/
        loratool verify merged/ --base TinyLlama-1.1B/ --adapter my-adapter/
    """
    from loratool.shards.course import ShareReport
    from loratool.verbs.verify import verify

    with render.progress_bar("verifying", quiet=quiet) as progress:
        findings = verify(
            merged,
            base=base,
            adapters=adapters,
            weights=weights,
            alpha=alpha,
            adapter_name=adapter_name,
            skip=skip,
            enable_lora=enable_lora,
            progress=progress,
            **settings,
        )
    is_clean = isinstance(findings, ShareReport) or findings.ok
    if as_json:
        render.print_json(findings.as_json())
    else:
        render.show(findings.document(), quiet=quiet and is_clean)
    return 0 if is_clean else 1
