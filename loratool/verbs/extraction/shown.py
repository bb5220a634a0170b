"""What people see of an extraction."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.display.document import Column, Document, Lines, Row, Table
from loratool.display.figures import counted, human_bytes, span
from loratool.display.folding import shortened
from loratool.names.sections import module_groups
from loratool.plan.shown import not_written
from loratool.verbs.extraction.difference import ModuleResult
from loratool.verbs.extraction.result import ExtractReport

__all__ = ["extraction_document"]


def extraction_document(report: ExtractReport) -> Document:
    """Return its modules, what they do not hold, and in one sentence what became of it."""
    return Document.of(
        (_modules(report), _leftovers(report), Lines((_summary(report),))),
        (*report.notes, *not_written(report.plan)),
    )


def _modules(report: ExtractReport) -> Table:
    total = report.total_change or 1.0
    names = [module.module for module in report.modules]
    columns = [
        Column("modules", folds=True, is_kept=True),
        Column("count", is_kept=True),
        Column("rank"),
    ]
    if report.is_written:
        columns += [
            Column("relative error"),
            Column("‖difference‖"),
            Column("share of the change", is_kept=True),
        ]

    def row(folded: tuple[str, ...], members: Sequence[ModuleResult]) -> Row:
        known = (folded, len(members), span((m.rank for m in members), "d"))
        if not report.is_written:
            return known
        return (
            *known,
            span(m.relative_error for m in members),
            span(m.squared_norm**0.5 for m in members),
            f"{sum(m.squared_norm for m in members) / total:.2%}",
        )

    groups = module_groups(report.modules, names, row, family=report.plan.family)
    return Table.grouped("" if report.is_written else "would be extracted", columns, groups)


def _leftovers(report: ExtractReport) -> Table:
    total = report.total_change or 1.0
    groups: dict[tuple[str, bool], list[int]] = {}
    for index, item in enumerate(report.leftovers):
        groups.setdefault((item.why, item.is_carried), []).append(index)
    rows: list[Row] = []
    for (why, is_carried), places in groups.items():
        items = [report.leftovers[place] for place in places]
        known = [item.squared_change for item in items if item.squared_change is not None]
        share = f"{sum(known) / total:.2%}" if known and report.is_written else "-"
        names = shortened([item.name for item in items])
        rows.append((names, len(items), why, "carried whole" if is_carried else "no", share))
    return Table.of(
        "not in the factors",
        (
            Column("tensors", folds=True, is_kept=True),
            Column("count", is_kept=True),
            Column("why", folds=True),
            "in the adapter",
            Column("share of the change", is_kept=True),
        ),
        rows,
    )


def _summary(report: ExtractReport) -> str:
    size = human_bytes(report.plan.nbytes)
    if report.is_written:
        return (
            f"{report.output}: {counted(len(report.plan.parts), 'module')}, {size}, relative error "
            f"{report.relative_error:.3g}; {report.captured:.2%} of the change"
            + ("" if report.device == "cpu" else f"; computed on {report.device}")
        )
    seconds = report.seconds or 0.0
    words = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    memory = human_bytes(report.peak_memory)
    if report.gpu_memory is not None:
        memory += f", {human_bytes(report.gpu_memory)} of {report.device}"
    return f"dry run, nothing written; at most {size}, about {words} and {memory} of memory"
