"""What people see of a rescaling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.display.document import Column, Document, Lines, Table
from loratool.display.figures import counted, human_bytes, span
from loratool.names.sections import module_groups
from loratool.plan.shown import adapter_files, carried_along, not_written

if TYPE_CHECKING:
    from loratool.verbs.rescale import RescaleReport

__all__ = ["rescaling_document"]


def rescaling_document(report: RescaleReport) -> Document:
    """Return its modules, what goes with them, and in one sentence what became of it."""
    plan, names = report.plan, list(report.scales)
    modules = Table.grouped(
        "",
        (
            Column("modules", folds=True, is_kept=True),
            Column("count", is_kept=True),
            "scale",
            "was",
            "delta",
        ),
        module_groups(
            names,
            names,
            lambda folded, members: (
                folded,
                len(members),
                span((report.scales[name][1] for name in members), ".6g"),
                span((report.scales[name][0] for name in members), ".6g"),
                "× " + span((report.ratios[name] for name in members), ".6g"),
            ),
            family=plan.family,
        ),
    )
    error = report.relative_error
    words = f"{report.output}: {counted(len(names), 'module')}, {human_bytes(plan.nbytes)}, " + (
        f"relative error {error:.3g}" if error else "exact"
    )
    return Document.of(
        (
            modules,
            *(() if report.is_written else adapter_files(plan)),
            carried_along(plan.extras if plan.parts else ()),
            Lines((words if report.is_written else f"dry run, nothing written; {words}",)),
        ),
        (*report.notes, *not_written(plan)),
    )
