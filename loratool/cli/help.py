"""How ``--help`` is laid out: options in groups, every choice named, nothing cut off.

It is click's own formatter. rich-click and cloup group options too: cloup takes every command the
time that click itself takes to be imported, and rich-click a tenth of a second for each page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Final

import click

from loratool.cli.named import Named
from loratool.cli.synonyms import OPTION_SYNONYMS
from loratool.display.characters import writable
from loratool.errors import printable

__all__ = [
    "GROUPS",
    "GroupedCommand",
    "choices_of",
    "group_of",
    "help_of",
    "no_such_option",
    "summary_of",
]

GROUPS: Final = {
    "What to do": (),
    "Naming": (
        *("to", "target", "source", "family", "naming", "component", "name", "adapter_name"),
        *("base_names", "tags", "license"),
    ),
    "Exactness": (
        *("dtype", "quantized", "allow_nonfinite", "seed", "method", "residual", "fold", "pad"),
        *("sync", "clamp_quantile", "alpha"),
    ),
    "Output": (
        *("output", "in_place", "force", "dry_run", "plot", "report", "as_json", "as_jsonl"),
        *("as_csv", "json_schema", "quiet", "into", "outside", "no_card"),
    ),
    "Many machines": ("shards", "finish", "wait", "executor"),
    "Running": (
        *("device", "threads", "workers", "resume", "offline"),
        *("debug", "version", "verbose"),
    ),
}
"""Under which heading an option is shown, by its name; under the first where none names it."""
FIRST, *_, LAST = GROUPS
LONGEST_METAVAR: Final = 30
"""A longer list of choices goes into the text, where it wraps."""
NEAR: Final = 3
HYPHEN: Final = re.compile(r"(?<=[\w-])-(?=[\w-])|(?<![\w-])-(?=-?\w)")
UNBROKEN: Final = "\N{NON-BREAKING HYPHEN}"


def group_of(option: click.Parameter) -> str:
    """Return the heading that an option is shown under."""
    if "--help" in option.opts:
        return LAST
    return next((title for title, names in GROUPS.items() if option.name in names), FIRST)


def choices_of(option: click.Parameter) -> tuple[str, ...]:
    """Return every value that an option may have, where these can be told."""
    if isinstance(option.type, click.Choice):
        return tuple(map(str, option.type.choices))
    return option.type.names if isinstance(option.type, Named) else ()


class HelpFormatter(click.HelpFormatter):
    """click's own, which breaks no line inside a name: ``--sv-ratio`` stays one word."""

    def write_text(self, text: str) -> None:
        super().write_text(HYPHEN.sub(UNBROKEN, text))

    def write_dl(
        self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2
    ) -> None:
        super().write_dl([(a, HYPHEN.sub(UNBROKEN, b)) for a, b in rows], col_max, col_spacing)

    def getvalue(self) -> str:
        return super().getvalue().replace(UNBROKEN, "-")


def help_of(command: click.Command, ctx: click.Context) -> str:
    """Return the help of a command."""
    formatter = HelpFormatter(width=ctx.terminal_width, max_width=ctx.max_content_width)
    command.format_help(ctx, formatter)
    clean = writable(sys.stdout.encoding)
    return "\n".join(clean(line) for line in formatter.getvalue().rstrip("\n").split("\n"))


class GroupedCommand(click.Command):
    """A command whose options are shown in groups, and which knows what others call them."""

    def get_help(self, ctx: click.Context) -> str:
        return help_of(self, ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group."""
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in GROUPS}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and not option.hidden:
                rows[group_of(option)].append(_row(option, ctx))
        for title, found in rows.items():
            if found:
                with formatter.section(title):
                    formatter.write_dl(found, col_max=24)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words, and say of one that is no option which one is meant."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            own = [name for option in self.get_params(ctx) for name in option.opts]
            raise click.UsageError(no_such_option(error.option_name, own), ctx) from None
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise


def no_such_option(given: str, own: Sequence[str]) -> str:
    """Return what to say of a word that is no option.

    Args:
        given: The word.
        own: The options that there are.
    """
    name = given.replace("_", "-")
    if name in own:
        near = [name]
    else:
        near = [each for each in OPTION_SYNONYMS.get(name, ()) if each in own][:1]
        near = near or get_close_matches(name, own, n=NEAR)
    words = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"no such option {printable(given)}{words}"


def _row(option: click.Option, ctx: click.Context) -> tuple[str, str]:
    """Return the name and the text of an option."""
    record = option.get_help_record(ctx)
    assert record is not None
    name, text = record
    choices = choices_of(option)
    metavar = option.make_metavar(ctx)
    if not choices:
        return name, text
    listed = f"[{'|'.join(choices)}]"
    if len(listed) <= LONGEST_METAVAR:
        return name.replace(metavar, listed), text
    word = option.type.name.upper()
    if not isinstance(option.type, Named):
        word = max(option.opts, key=len).lstrip("-").upper()
    return name.replace(metavar, word), f"{text.rstrip()} {word}: {', '.join(choices)}."


def summary_of(source: str) -> str:
    """Return the first sentence of the docstring of a command, from the text of its module."""
    found = re.search(r'def command\(.*?\) -> \w+:\n +"""(.*?)(?:\n\n|""")', source, re.DOTALL)
    if found is None:
        return ""
    text = " ".join(found[1].split())
    return text.partition(". ")[0].rstrip(".") + "."
