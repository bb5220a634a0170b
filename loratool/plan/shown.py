"""What people see of a plan: files, what changes, what travels along, what is not written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loratool.display.document import Block, Column, Document, Lines, Table
from loratool.display.figures import counted, human_bytes
from loratool.display.folding import fold_names, listed
from loratool.plan.adapter import AdapterPlan
from loratool.plan.model import ModelPlan

__all__ = ["adapter_files", "carried_along", "model_document", "not_written"]


def adapter_files(plan: AdapterPlan) -> Iterator[Block]:
    """Yield the files of an adapter that would be written."""
    files = plan.described_files()
    yield Table.of(
        "files",
        (Column("file", folds=True, is_kept=True), Column("size", is_kept=True)),
        [(file["name"], human_bytes(file["bytes"])) for file in files],
    )
    memory = human_bytes(plan.peak_memory)
    yield Lines((f"{counted(len(plan.specs), 'tensor')}; about {memory} of memory",))


def carried_along(names: Sequence[str]) -> Lines:
    """Return which tensors travel along without being part of a delta."""
    return Lines((f"carried along: {listed(names)}",) if names else ())


def not_written(plan: AdapterPlan) -> tuple[str, ...]:
    """Return what of the inputs is not written, a sentence for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in (*plan.dropped, *plan.left_behind):
        reasons.setdefault(why, []).append(name)
    return tuple(f"not written: {listed(names)}: {why}" for why, names in reasons.items())


def model_document(plan: ModelPlan) -> Document:
    """Return the files of a model that would be written, and what changes in them."""
    files = Table.of(
        "would be written",
        (
            Column("file", folds=True, is_kept=True),
            Column("size", is_kept=True),
            Column("tensors", is_kept=True),
            Column("changed", is_kept=True),
        ),
        [
            (
                file.name,
                human_bytes(file.size),
                len(file.steps),
                sum(step.is_changed for step in file.steps),
            )
            for file in plan.files
        ],
    )
    beside = Table.of(
        "beside them",
        (Column("file", folds=True, is_kept=True), Column("what", folds=True, is_kept=True)),
        [(item.name, item.why or "as it is") for item in plan.others()],
    )
    left = Table.of(
        "not carried over",
        (Column("file", folds=True, is_kept=True), Column("why", folds=True)),
        plan.left_behind,
    )
    memory = human_bytes(plan.peak_memory)
    summary = f"{human_bytes(plan.nbytes)} in all; about {memory} of memory; "
    fetched: tuple[str, ...] = ()
    if missing := plan.unfetched:
        size = human_bytes(sum(file.size for file in missing))
        fetched = (f"would be fetched first: {counted(len(missing), 'file')}, {size}",)
    skipped = [f"skipped: {key}" for key in plan.unused]
    return Document.of(
        (
            files,
            beside,
            _changes(plan),
            left,
            Lines((*fetched, *skipped, f"{summary}{plan.copied} tensors are copied")),
        ),
        plan.notes,
    )


def _changes(plan: ModelPlan) -> Table:
    changed: dict[str, list[str]] = {}
    for step in plan.steps():
        if step.is_changed:
            changed.setdefault(step.words, []).append(step.spec.name)
    return Table.of(
        "changes",
        (
            Column("tensors", folds=True, is_kept=True),
            Column("count", is_kept=True),
            Column("what happens", folds=True),
        ),
        [(tuple(fold_names(names)), len(names), words) for words, names in changed.items()],
    )
