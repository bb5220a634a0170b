"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

__all__ = [
    "PATH",
    "adapter_name",
    "alpha",
    "as_json",
    "debug",
    "device",
    "quiet",
    "skip",
    "threads",
    "weights",
]

PATH = click.Path(path_type=Path)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _checked_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise click.BadParameter(f"{value!r}; expected auto, cpu, cuda or cuda:N")
    return value


as_json: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of a table."
)
quiet: Decorator = click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
debug: Decorator = click.option(
    "--debug", is_flag=True, expose_value=False, help="Show a traceback where something fails."
)
adapter_name: Decorator = click.option(
    "--adapter-name", metavar="N", help="Which adapter, where a path holds several."
)
alpha: Decorator = click.option(
    "--alpha", type=float, metavar="A", help="Alpha for adapters that record none."
)
weights: Decorator = click.option(
    "-w",
    "--weight",
    "weights",
    type=float,
    multiple=True,
    metavar="W",
    help="Weight of an adapter, once for each in order; missing ones are 1.",
)
skip: Decorator = click.option(
    "--skip",
    multiple=True,
    metavar="RE",
    help="Leave out adapter keys that match, and report them.",
)
device: Decorator = click.option(
    "--device",
    default="auto",
    metavar="D",
    callback=lambda ctx, param, value: _checked_device(value),
    help="Where to compute: auto (the processor), cpu, cuda or cuda:N.",
)
threads: Decorator = click.option(
    "--threads",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Worker threads; by default one for each processor, at most 8.",
)
