"""What people see of an adapter that was composed or truncated."""

from __future__ import annotations

from loratool.display.document import Column, Document, Lines, Table
from loratool.display.figures import counted, human_bytes, span
from loratool.names.sections import module_groups
from loratool.plan.shown import adapter_files, carried_along, not_written
from loratool.verbs.algebra.result import AdapterReport

__all__ = ["adapter_document"]


def adapter_document(report: AdapterReport) -> Document:
    """Return its modules, what goes with them, and in one sentence what became of it."""
    plan = report.plan
    names = [module.module for module in report.modules]
    modules = Table.grouped(
        "" if report.is_written else "would be written",
        (
            Column("modules", folds=True, is_kept=True),
            Column("count", is_kept=True),
            "rank",
            "from",
            "relative error",
            "‖delta‖",
        ),
        module_groups(
            report.modules,
            names,
            lambda folded, members: (
                folded,
                len(members),
                span((m.rank for m in members), "d"),
                span((m.from_rank for m in members), "d"),
                span(m.relative_error for m in members),
                span(m.squared_norm**0.5 for m in members),
            ),
            family=plan.family,
        ),
    )
    return Document.of(
        (
            modules,
            *(() if report.is_written else adapter_files(plan)),
            carried_along(plan.extras if plan.parts else ()),
            Lines((_summary(report),)),
        ),
        (*report.notes, *not_written(plan)),
    )


def _summary(report: AdapterReport) -> str:
    words = (
        f"{report.output}: {counted(len(report.plan.parts), 'module')}, "
        f"{human_bytes(report.plan.nbytes)}, "
        f"relative error {report.relative_error:.3g}"
    )
    if report.distance_from_sum is not None:
        words += f"; {report.distance_from_sum:.3g} from the plain sum"
    return words if report.is_written else f"dry run, nothing written; {words}"
