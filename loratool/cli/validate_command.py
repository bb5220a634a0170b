"""``loratool validate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from loratool.cli import options, render
from loratool.cli.help import GroupedCommand
from loratool.verbs.validate import validate, validate_many

__all__ = ["command"]


@click.command("validate", cls=GroupedCommand)
@click.argument("adapters", type=options.PATH, nargs=-1, required=True, metavar="ADAPTER...")
@options.recursive
@click.option("--base", type=options.PATH, help="The model that it should fit.")
@click.option(
    "--deep", is_flag=True, help="Read the tensors too: NaN, infinity, untrained factors."
)
@options.target("Also find what this loader would refuse or misread.")
@options.sort
@options.adapter_name
@options.quiet
@options.as_json
@options.as_jsonl
@options.as_csv
@options.debug
def command(
    adapters: tuple[Path, ...],
    recursive: bool,
    base: Path | None,
    deep: bool,
    target: str | None,
    sort: str | None,
    adapter_name: str | None,
    quiet: bool,
    as_json: bool,
    as_jsonl: bool,
    as_csv: bool,
) -> int:
    """Find everything wrong with an adapter, or with many.

    Every finding has a code that docs/findings.md explains. The exit status is 1 where there
    is an error, 0 where there are only warnings. Several paths, and folders of adapters, are a
    row each; a path that cannot be read has one too, and makes the exit status 1.

    \b
    Example:
        loratool validate my-adapter/ --base TinyLlama-1.1B/ --deep
        loratool validate my-adapter/ --for vllm
        loratool validate adapters/ --recursive --base TinyLlama-1.1B/ --jsonl
    """
    settings: dict[str, Any] = {
        "base": base,
        "deep": deep,
        "adapter_name": adapter_name,
        "target": target,
    }
    is_many = options.are_many(
        adapters,
        recursive=recursive,
        adapter_name=adapter_name,
        asks_for_rows=sort is not None or as_csv,
    )
    if is_many:
        from loratool.cli.many import tell

        return tell(
            validate_many(adapters, recursive=recursive, **settings),
            is_bad=lambda one: not one.findings.ok,
            as_json=as_json,
            as_jsonl=as_jsonl,
            as_csv=as_csv,
            sort=sort,
            quiet=quiet,
        )
    findings = validate(adapters[0], **settings)
    if as_jsonl:
        click.echo(json.dumps(findings.as_json()))
    elif as_json:
        render.print_json(findings.as_json())
    else:
        render.show(findings.document(), quiet=quiet and not findings)
    return 0 if findings.ok else 1
