"""From a draft to an adapter on the disk: choose the ranks, write, report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from loratool.files.atomic import check_output
from loratool.ops.algebra.computing import Method, ModuleReport, joint_spectra
from loratool.ops.algebra.joining import Joint
from loratool.ops.algebra.plan import AdapterPlan
from loratool.ops.algebra.planning import Draft
from loratool.ops.algebra.ranks import Truncation, choose_ranks, full_ranks
from loratool.ops.algebra.reporting import expected_report, meets_error
from loratool.ops.algebra.result import AdapterReport
from loratool.ops.algebra.writing import Progress, arithmetic, in_parallel, write_adapter

__all__ = ["finish"]

ROUNDING_MATTERS: Final = frozenset(("F16", "BF16"))


def finish(
    draft: Draft,
    truncation: Truncation,
    *,
    inputs: Sequence[Path],
    force: bool,
    dry_run: bool,
    device: str,
    threads: int | None,
    progress: Progress | None,
    base_norms: Mapping[str, float] | None = None,
    method: Method | None = None,
    rests: Mapping[str, float] | None = None,
) -> AdapterReport:
    """Choose the ranks and write the adapter.

    Args:
        draft: Everything but the ranks.
        truncation: How far to truncate, if at all.
        inputs: What the output may not touch.
        force: Replace an existing output.
        dry_run: Compute, report, and write nothing.
        device: Where to compute.
        threads: Number of modules in work at a time.
        progress: Called with how much is done and how much there is.
        base_norms: ``‖W‖_F`` by module, to weigh errors in a common budget.
        method: How deltas are combined; by default added up.
        rests: What a module lacks already of the ``‖Δ‖²`` that it stands for, by name.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    how = method or Method()
    if not dry_run:
        check_output(draft.output, force=force, inputs=inputs)
    joints = draft.joints
    spectra: dict[str, list[list[float]]] = {}
    if truncation.needs_spectra or dry_run:
        kind = arithmetic(device)
        found = in_parallel(
            lambda joint: joint_spectra(joint, how, kind),
            joints,
            threads=threads,
            progress=progress if dry_run else _part(progress, 0, 2),
            sizes=[_size(joint) for joint in joints],
        )
        spectra = {joint.name: values for joint, values in zip(joints, found, strict=True)}
    if truncation.needs_spectra:
        is_met = None
        if truncation.max_error is not None and not rests:
            is_met = meets_error(draft, how, arithmetic(device), truncation.max_error, spectra)
        ranks = choose_ranks(
            joints,
            truncation,
            spectra,
            plan_for=draft.plan,
            base_norms=base_norms,
            is_met=is_met,
            rests=rests,
        )
    else:
        ranks = full_ranks(joints, truncation)
    plan = draft.plan(ranks)
    written = {job.joint.name: job.output.rank for job in plan.jobs}
    if dry_run:
        reports = [
            expected_report(joint, written.get(joint.name, 0), spectra[joint.name])
            for joint in joints
        ]
        return AdapterReport(tuple(reports), plan, False, plan.notes)
    reports = write_adapter(
        plan,
        draft.output,
        inputs=inputs,
        method=how,
        force=force,
        device=device,
        threads=threads,
        progress=_part(progress, 1, 2) if spectra else progress,
    )
    # A module that the budget leaves out is an error like any other.
    reports += [
        expected_report(joint, 0, spectra[joint.name])
        for joint in joints
        if joint.name not in written
    ]
    return AdapterReport(
        tuple(reports), plan, True, (*plan.notes, *_result_notes(plan, reports, truncation))
    )


def _result_notes(
    plan: AdapterPlan, modules: Sequence[ModuleReport], truncation: Truncation
) -> list[str]:
    notes = []
    cancelled = [module.module for module in modules if module.cancelled]
    if cancelled:
        notes.append(
            f"the deltas cancel in {len(cancelled)} modules, such as {cancelled[0]!r}; they are "
            "zero there"
        )
    padded = [m for m in modules if m.rank > max(m.from_rank, 1)]
    if padded:
        notes.append(
            f"{len(padded)} modules have fewer ranks than {padded[0].rank} and are filled with "
            "zeros"
        )
    limit = truncation.max_error
    if limit is not None:
        missed = [m for m in modules if m.relative_error > limit]
        if missed:
            worst = max(m.relative_error for m in missed)
            narrow = {job.output.dtype for job in plan.jobs} & ROUNDING_MATTERS
            advice = "; write them with --dtype float32" if narrow else ""
            notes.append(
                f"{len(missed)} modules miss --max-error {limit:g} for the rounding to their "
                f"dtype alone (up to {worst:.3g}){advice}"
            )
    elif not any(module.discarded for module in modules):
        total = math.fsum(module.squared_norm for module in modules)
        error = math.fsum(module.squared_error for module in modules)
        dtypes = {job.output.dtype for job in plan.jobs}
        if total and math.sqrt(error / total) > 1e-4 and dtypes & ROUNDING_MATTERS:
            notes.append(
                f"rounding to {', '.join(sorted(dtypes))} costs {math.sqrt(error / total):.2g}; "
                "write float32 with --dtype float32 for none"
            )
    return notes


def _size(joint: Joint) -> int:
    return sum(t.spec.nbytes for term in joint.terms for t in term.site.slots.values())


def _part(progress: Progress | None, part: int, parts: int) -> Progress | None:
    """Return a callback that reports one of several passes over the same input."""
    if progress is None:
        return None
    return lambda done, total: progress(part * total + done, parts * total)
