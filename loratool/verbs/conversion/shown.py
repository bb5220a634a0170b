"""What people see of a conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.display.document import Column, Document, Lines, Table
from loratool.display.figures import counted, human_bytes, span
from loratool.names.sections import module_groups
from loratool.plan.shown import adapter_files, carried_along, not_written

if TYPE_CHECKING:
    from loratool.verbs.convert import ConvertReport

__all__ = ["conversion_document"]


def conversion_document(report: ConvertReport) -> Document:
    """Return its modules, how they changed, and in one sentence what became of it."""
    plan = report.plan
    names = [item.part.module for item in plan.parts]
    modules = Table.grouped(
        "" if report.is_written else "would be written",
        (
            Column("modules", folds=True, is_kept=True),
            Column("count", is_kept=True),
            "rank",
            "scale",
            "relative error",
        ),
        module_groups(
            plan.parts,
            names,
            lambda folded, members: (
                folded,
                len(members),
                span((item.part.rank for item in members), "d"),
                span((item.part.scale for item in members), ".6g"),
                span(report.outcome.relative(item.part.module) for item in members),
            ),
            family=plan.family,
        ),
    )
    return Document.of(
        (
            modules,
            Lines(tuple(f"{counted(count, 'module')}: {note}" for note, count in plan.changes())),
            *(() if report.is_written else adapter_files(plan)),
            carried_along(plan.extras),
            Lines((_summary(report),)),
        ),
        (*report.notes, *not_written(plan)),
    )


def _summary(report: ConvertReport) -> str:
    plan = report.plan
    moved = sum(item.is_moved for item in plan.parts)
    exact = "exact" if report.is_exact else f"relative error {report.relative_error:.3g}"
    dropped = f", {len(plan.dropped)} dropped" if plan.dropped else ", nothing dropped"
    words = (
        f"{report.output}: {report.source} → {plan.scheme}, {counted(len(plan.parts), 'module')} "
        f"({moved} moved, {len(plan.parts) - moved} computed), "
        f"{human_bytes(plan.nbytes)}, {exact}{dropped}"
    )
    return words if report.is_written else f"dry run, nothing written; {words}"
