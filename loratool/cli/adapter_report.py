"""What ``truncate`` and ``compose`` say about the adapter they wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import render
from loratool.cli.folding import fold_names
from loratool.cli.grouping import group_modules, span
from loratool.errors import printable

if TYPE_CHECKING:
    from loratool.plan.adapter import AdapterPlan
    from loratool.verbs.algebra.result import AdapterReport

__all__ = ["print_left_out", "print_plan", "print_report"]

LISTED: int = 8


def print_report(report: AdapterReport, output: Path, *, as_json: bool, quiet: bool) -> None:
    """Print a report for a script, or a table and a summary for a person."""
    if as_json:
        render.print_json(report.as_json())
        return
    render.print_notes(report.notes)
    if quiet:
        return
    names = [module.module for module in report.modules]
    render.print_table(
        "would be written" if not report.is_written else "",
        ("modules", "count", "rank", "from", "relative error", "‖delta‖"),
        [
            (
                folded,
                len(members),
                span((m.rank for m in members), "d"),
                span((m.from_rank for m in members), "d"),
                span(m.relative_error for m in members),
                span(m.squared_norm**0.5 for m in members),
            )
            for folded, members in group_modules(report.modules, names)
        ],
    )
    print_plan(report.plan, with_files=not report.is_written)
    click.echo(_summary(report, output))


def print_plan(plan: AdapterPlan, *, with_files: bool) -> None:
    """Print what is carried along and what is not written, and for a dry run the files.

    Args:
        plan: The plan.
        with_files: Whether to list the files.
    """
    if with_files:
        files = plan.described_files()
        render.print_table(
            "files",
            ("file", "size"),
            [(file["name"], render.human_bytes(file["bytes"])) for file in files],
        )
        click.echo(
            f"{len(plan.specs)} tensors; about {render.human_bytes(plan.peak_memory)} of memory"
        )
    print_left_out(list(plan.extras) if plan.parts else [], plan.dropped)


def print_left_out(carried: list[str], dropped: Sequence[tuple[str, str]]) -> None:
    """Print which tensors travel along, and what is not written, by reason."""
    if carried:
        click.echo(f"carried along: {_listed(carried)}")
    reasons: dict[str, list[str]] = {}
    for name, why in dropped:
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        click.echo(f"not written: {_listed(names)}: {why}", err=True)


def _listed(names: list[str]) -> str:
    """Return names, folded where they are dotted paths, and not too many of them."""
    is_dotted = all(name.count(".") > 1 for name in names)
    shown = [printable(name) for name in (fold_names(names) if is_dotted else names)]
    more = f" and {len(shown) - LISTED} more" if len(shown) > LISTED else ""
    return ", ".join(shown[:LISTED]) + more


def _summary(report: AdapterReport, output: Path) -> str:
    words = (
        f"{printable(output)}: {len(report.plan.parts)} modules, "
        f"{render.human_bytes(report.plan.nbytes)}, relative error {report.relative_error:.3g}"
    )
    if report.distance_from_sum is not None:
        words += f"; {report.distance_from_sum:.3g} from the plain sum"
    return words if report.is_written else f"dry run, nothing written; {words}"
