"""``loratool validate``."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand
from loratool.verbs.validate import validate

__all__ = ["command"]


@click.command("validate", cls=GroupedCommand)
@click.argument("adapter", type=options.PATH)
@click.option("--base", type=options.PATH, help="The model that it should fit.")
@click.option(
    "--deep", is_flag=True, help="Read the tensors too: NaN, infinity, untrained factors."
)
@options.target("Also find what this loader would refuse or misread.")
@options.adapter_name
@options.as_json
@options.debug
@click.pass_context
def command(
    ctx: click.Context,
    adapter: Path,
    base: Path | None,
    deep: bool,
    target: str | None,
    adapter_name: str | None,
    as_json: bool,
) -> int:
    """Find everything wrong with an adapter.

    Every finding has a code that docs/findings.md explains. The exit status is 1 where there
    is an error, 0 where there are only warnings.

    \b
    Example:
        loratool validate my-adapter/ --base TinyLlama-1.1B/ --deep
        loratool validate my-adapter/ --for vllm
    """
    findings = validate(adapter, base=base, deep=deep, adapter_name=adapter_name, target=target)
    if as_json:
        render.print_json(findings.as_json())
    else:
        render.show(findings.document())
    return 0 if findings.ok else 1
