"""Options that several commands share."""

from __future__ import annotations

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
    "quiet",
    "skip",
    "threads",
    "weights",
]

PATH = click.Path(path_type=Path)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

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
threads: Decorator = click.option(
    "--threads",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Worker threads; by default one for each processor, at most 8.",
)
