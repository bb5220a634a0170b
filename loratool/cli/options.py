"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from loratool.cli.named import DEVICE, DTYPE, EXECUTOR, LOADER, SCHEME
from loratool.files.places import located

__all__ = [
    "PATH",
    "Whole",
    "adapter_name",
    "alpha",
    "are_many",
    "as_csv",
    "as_json",
    "as_jsonl",
    "debug",
    "device",
    "dry_run",
    "dtype",
    "executor",
    "extraction",
    "finish",
    "force",
    "no_card",
    "output",
    "plot",
    "quiet",
    "recursive",
    "report",
    "shards",
    "skip",
    "sort",
    "target",
    "threads",
    "to",
    "truncation",
    "wait",
    "weights",
]


class _GivenPath(click.Path):
    """A path, which is not empty as that of a variable that is not set."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value == "":
            self.fail("it is empty; is a variable of the shell not set?", param, ctx)
        return super().convert(value, param, ctx)


class Whole(click.IntRange):
    """A whole number, called so where it is none."""

    name = "whole number"


PATH = _GivenPath(path_type=Path)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def to(help_text: str, *, required: bool = False) -> Decorator:
    """Return ``--to``, which takes every scheme that is written."""
    return click.option("--to", type=SCHEME, required=required, help=help_text)


def target(help_text: str) -> Decorator:
    """Return ``--for``, which takes every loader that is known."""
    return click.option("--for", "target", type=LOADER, help=help_text)


def _parts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[bool, ...]:
    if value is None:
        return ()
    words = [word.strip().lower() for word in value.split(",")]
    if not words or any(word not in ("1", "0", "true", "false") for word in words):
        raise click.BadParameter(f"{value!r}; expected such as 1,0,1")
    return tuple(word in ("1", "true") for word in words)


def _device(help_text: str) -> Decorator:
    """Return ``--device``."""
    return click.option("--device", default="auto", type=DEVICE, help=help_text)


def as_json(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--json``, and what tells how its documents look."""
    schema = click.option(
        "--json-schema",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_schema,
        help="Print the JSON Schema of what --json prints, and exit.",
    )
    json = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document instead of a table."
    )
    return json(schema(command))


def _print_schema(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from loratool.cli.json_schemas import json_schema
        from loratool.cli.render import print_json

        print_json(json_schema(str(ctx.info_name)))
        ctx.exit()


quiet: Decorator = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    help="No progress, and no summary of what was written or found in order.",
)
debug: Decorator = click.option(
    "--debug", is_flag=True, expose_value=False, help="Show a traceback where something fails."
)
adapter_name: Decorator = click.option(
    "--adapter-name", metavar="N", help="Which adapter, where a path holds several."
)
base: Decorator = click.option(
    "--base",
    type=PATH,
    help="The model they are for: names, and heads of .gguf adapters (headers only).",
)
alpha: Decorator = click.option(
    "--alpha", type=float, metavar="A", help="Alpha for adapters that record none."
)
weights: Decorator = click.option(
    "-w",
    "--weight",
    "weights",
    multiple=True,
    metavar="W",
    help="A number for each adapter, in order, and PATTERN=N for single modules: te1=0.5, "
    "layers.0-11=0, 2:unet=0.8.",
)
skip: Decorator = click.option(
    "--skip",
    multiple=True,
    metavar="RE",
    help="Leave out adapter keys that match, and report them; glob: before a pattern of -w.",
)
enable_lora: Decorator = click.option(
    "--enable-lora",
    metavar="1,0,1",
    callback=_parts,
    help="Parts of a merged projection that stacked loralib factors are for.",
)
device: Decorator = _device("Where to compute: auto (the processor), cpu, cuda or cuda:N.")
gpu_device: Decorator = _device(
    "cpu, cuda, cuda:N or several with commas; auto is a GPU for pairs over 2 GB."
)
threads: Decorator = click.option(
    "--threads",
    type=Whole(1, 64),
    metavar="N",
    help="Worker threads; by default one for each processor, at most 8.",
)
all_threads: Decorator = click.option(
    "--threads",
    type=Whole(1, 1024),
    metavar="N",
    help="Worker threads; by default one for each processor, as memory allows.",
)


executor: Decorator = click.option(
    "--executor",
    type=EXECUTOR,
    help="Who does it: processes here, a cluster of dask that is there, or the processes of an MPI "
    "job. Elsewhere the same paths have to lead to the same files.",
)


class _RankOrAuto(click.ParamType[int | str]):
    """A rank, or the word ``auto``."""

    name = "rank"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        if value == "auto":
            return "auto"
        try:
            found = Whole(1).convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is neither a number from 1 on nor auto", param, ctx)
        assert isinstance(found, int)
        return found


def truncation(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how far to truncate."""
    rank = click.option("--rank", type=Whole(1), metavar="R", help="At most this rank.")
    return rank(_rules(command))


def extraction(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the same for an extraction, whose rank may also be ``auto``."""
    words = "At most this rank; auto: down to the rounding noise of the stored dtype."
    rank = click.option("--rank", type=_RankOrAuto(), metavar="R|auto", help=words)
    return rank(_rules(command))


def _rules(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option(
            "--energy",
            type=float,
            metavar="E",
            help="Smallest rank keeping this share of ‖delta‖² in each module.",
        ),
        click.option(
            "--max-error",
            type=float,
            metavar="X",
            help="Smallest rank with at most this relative error in each module.",
        ),
        click.option(
            "--max-size",
            metavar="SIZE",
            help="Bytes of the whole file (8MB), spread for the smallest total error.",
        ),
        click.option(
            "--sv-ratio", type=float, metavar="P", help="Keep singular values above the first / P."
        ),
        click.option(
            "--sv-fro", type=float, metavar="P", help="Smallest rank keeping this share of ‖delta‖."
        ),
        click.option(
            "--sv-cumulative",
            type=float,
            metavar="P",
            help="Smallest rank keeping this share of the sum of singular values.",
        ),
        click.option(
            "--rank-multiple",
            type=Whole(1),
            default=1,
            metavar="M",
            help="Make every rank a multiple of this, such as 8 for servers.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


output: Decorator = click.option(
    "-o", "--output", type=PATH, required=True, help="Where the result goes."
)
force: Decorator = click.option("--force", is_flag=True, help="Replace an existing output.")
no_card: Decorator = click.option(
    "--no-card", is_flag=True, help="Write no README.md; one that the input has stays as it is."
)
dry_run: Decorator = click.option(
    "--dry-run", is_flag=True, help="Say what would be written, and write nothing."
)
dtype: Decorator = click.option(
    "--dtype",
    type=DTYPE,
    help="Write floats in this; by default as the input.",
)
plot: Decorator = click.option(
    "--plot", type=PATH, metavar="FILE", help="Draw it: a .png, .svg, .pdf or .html file."
)
report: Decorator = click.option(
    "--report", type=PATH, metavar="FILE", help="Write it as one page: an .html file."
)
recursive: Decorator = click.option(
    "--recursive", is_flag=True, help="Look into all folders in the folders that are named."
)
sort: Decorator = click.option(
    "--sort", metavar="COLUMN", help="Sort rows by this column; -COLUMN from the largest on."
)
as_jsonl: Decorator = click.option(
    "--jsonl", "as_jsonl", is_flag=True, help="Print one JSON document a line, as it is read."
)
as_csv: Decorator = click.option("--csv", "as_csv", is_flag=True, help="Print rows as CSV.")


def are_many(
    paths: Sequence[Path], *, recursive: bool, adapter_name: str | None, asks_for_rows: bool
) -> bool:
    """Whether rows are asked for: of several paths, of all folders, or of a folder of adapters.

    Args:
        paths: What was named.
        recursive: Whether all folders are looked into.
        adapter_name: Which adapter of a folder of several is meant.
        asks_for_rows: Whether an option asks for rows, even of one path.
    """
    if len(paths) > 1 or recursive or asks_for_rows:
        return True
    path = located(paths[0])
    if adapter_name is not None or not path.is_dir():
        return False
    from loratool.schemes.folders import is_collection

    return is_collection(path)


shards = click.option(
    "--shards",
    metavar="I/N",
    help="Do one of N shares, into OUT.loratool-parts; or 'auto': whatever nobody does yet.",
)
finish = click.option(
    "--finish", is_flag=True, help="Check all parts, and make the output of them."
)
wait = click.option("--wait", is_flag=True, help="Wait until all parts are there.")
