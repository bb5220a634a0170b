"""What the verbs that write an adapter return, and how they come to it: ranks, writing, report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.display.shown import Shown
from loratool.errors import spoken
from loratool.files.atomic import check_output
from loratool.plan.adapter import AdapterPlan
from loratool.plan.outcome import Outcome
from loratool.plan.plan import write as write_plan
from loratool.plan.threads import Progress, in_parallel
from loratool.verbs.algebra.combination import Combination
from loratool.verbs.algebra.modules import Joint
from loratool.verbs.algebra.ranks import Truncation, choose_ranks, full_ranks, ruling_notes
from loratool.verbs.algebra.sums import ModuleReport, SumOfDeltas, joint_spectra

if TYPE_CHECKING:
    from loratool.display.document import Document

__all__ = ["AdapterReport", "finish"]

ROUNDED: Final = frozenset(("F16", "BF16"))
CLOSE: Final = 0.9995
"""An error this close to a limit may be pushed over it by the rounding of float32."""
Spectra = Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class AdapterReport(Shown):
    """An adapter that was written, or would be.

    Attributes:
        modules: What was written for each module, against what it should be; empty for a dry
            run that computed nothing.
        plan: What was decided.
        is_written: Whether it was written.
        notes: What a user should know, one sentence each.
        output: Where it is, or would be.
    """

    modules: tuple[ModuleReport, ...]
    plan: AdapterPlan
    is_written: bool
    notes: tuple[str, ...]
    output: Path

    @property
    def relative_error(self) -> float:
        """``‖written - Δ‖ / ‖Δ‖`` over all modules; 0 where every Δ is zero."""
        return self._relative(math.fsum(m.squared_error for m in self.modules))

    @property
    def distance_from_sum(self) -> float | None:
        """``‖written - Σ weight · Δ‖ / ‖Δ‖``, for methods other than the sum."""
        found = [m.squared_distance for m in self.modules if m.squared_distance is not None]
        return self._relative(math.fsum(found)) if found else None

    def _relative(self, squared: float) -> float:
        total = math.fsum(module.squared_norm for module in self.modules)
        return math.sqrt(squared / total) if total else 0.0

    def records(self) -> list[dict[str, Any]]:
        """Return flat rows, for a table or a DataFrame: one for each module."""
        return [
            {
                "module": module.module,
                "rank": module.rank,
                "from_rank": module.from_rank,
                "relative_error": module.relative_error,
                "frobenius_norm": math.sqrt(module.squared_norm),
            }
            for module in self.modules
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        plan = self.plan
        document: dict[str, Any] = {
            "schema": 1,
            "dry_run": not self.is_written,
            "output": spoken(str(self.output)),
            "relative_error": self.relative_error,
            "modules": [
                {
                    "module": module.module,
                    "rank": module.rank,
                    "from_rank": module.from_rank,
                    "relative_error": module.relative_error,
                    "frobenius_norm": math.sqrt(module.squared_norm),
                    "singular_values": list(module.singular_values),
                    "discarded_singular_values": list(module.discarded),
                }
                for module in self.modules
            ],
            "bytes_written" if self.is_written else "bytes_to_write": plan.nbytes,
            "tensors": len(plan.specs),
            "files": plan.described_files(),
            "peak_memory": plan.peak_memory,
            "sidecars": [sidecar.name for sidecar in plan.sidecars],
            "carried": list(plan.extras),
            "dropped": [{"name": name, "why": why} for name, why in plan.dropped],
            "left_behind": [{"name": name, "why": why} for name, why in plan.left_behind],
            "notes": list(self.notes),
        }
        if self.distance_from_sum is not None:
            document["distance_from_sum"] = self.distance_from_sum
        return document

    def document(self) -> Document:
        """Return what people see of it."""
        from loratool.verbs.algebra.shown import adapter_document

        return adapter_document(self)


def finish(
    draft: Combination,
    truncation: Truncation,
    *,
    inputs: Sequence[Path],
    force: bool,
    dry_run: bool,
    threads: int | None,
    progress: Progress | None,
    base_norms: Mapping[str, float] | None = None,
    rests: Mapping[str, float] | None = None,
) -> AdapterReport:
    """Choose the ranks and write the adapter.

    Args:
        draft: Everything but the ranks.
        truncation: How far to truncate, if at all.
        inputs: What the output may not touch.
        force: Replace an existing output.
        dry_run: Compute, report, and write nothing.
        threads: Number of modules in work at a time.
        progress: Called with how much is done and how much there is.
        base_norms: ``‖W‖_F`` by module, to weigh errors in a common budget.
        rests: What a module lacks already of the ``‖Δ‖²`` that it stands for, by name.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    output = draft.options.output
    if not dry_run:
        check_output(output, force=force, inputs=inputs)
    if truncation.max_size is not None:
        draft = draft.with_one_rank()
    joints = draft.joints
    ranks = full_ranks(joints, truncation)
    plan = draft.plan(ranks)  # what cannot be written fails before the work
    spectra: Spectra = {}
    if truncation.needs_spectra or dry_run:
        found = in_parallel(
            lambda joint: joint_spectra(joint, draft.method),
            joints,
            threads=threads,
            progress=progress if dry_run else _part(progress, 0, 2),
            sizes=[joint.nbytes for joint in joints],
        )
        spectra = {joint.name: values for joint, values in zip(joints, found, strict=True)}
    if truncation.needs_spectra:
        is_met = None
        if truncation.max_error is not None and not rests:
            is_met = _meets_error(draft, truncation.max_error, spectra)
        ranks = choose_ranks(
            joints,
            truncation,
            spectra,
            plan_for=draft.plan,
            is_whole=draft.is_whole,
            base_norms=base_norms,
            is_met=is_met,
            rests=rests,
        )
        plan = draft.plan(ranks)
    if dry_run:
        reports = [expected_report(j, ranks[j.rank_group], spectra[j.name]) for j in joints]
        ruling = ruling_notes(truncation, map(_figures, reports))
        return AdapterReport(tuple(reports), plan, False, (*plan.notes, *ruling), output)
    outcome = write_plan(
        plan,
        output,
        inputs=inputs,
        force=force,
        threads=threads,
        progress=_part(progress, 1, 2) if spectra else progress,
    )
    written = [_report_of(joint, outcome) for joint in joints if ranks[joint.rank_group]]
    # A module that the budget leaves out is an error like any other.
    gone = [
        expected_report(joint, 0, spectra[joint.name])
        for joint in joints
        if not ranks[joint.rank_group]
    ]
    reports = [*written, *gone]
    dtypes = {joint.shape.dtype for joint in joints}
    notes = [
        *ruling_notes(truncation, map(_figures, reports)),
        *_result_notes(dtypes, reports, truncation),
    ]
    return AdapterReport(tuple(reports), plan, True, (*plan.notes, *notes), output)


def _figures(module: ModuleReport) -> tuple[int, float, float]:
    return module.rank, module.squared_norm, module.squared_error


def _report_of(joint: Joint, outcome: Outcome) -> ModuleReport:
    """Return what was written for a module; of a tied head, what was for its embedding."""
    found: ModuleReport | None = outcome.reports.get(joint.name)
    if found is None and joint.twin_of is not None:
        table: ModuleReport = outcome.reports[joint.twin_of]
        return table.scaled(joint.name, joint.twin_scale)
    assert found is not None
    return found


def expected_report(joint: Joint, rank: int, spectra: Sequence[Sequence[float]]) -> ModuleReport:
    """Return the report of a module from its singular values, without rounding."""
    kept = [value for values in spectra for value in values[:rank]]
    tail = [value for values in spectra for value in values[rank:]]
    return ModuleReport(
        joint.name,
        rank,
        joint.full_rank,
        math.fsum(value * value for value in (*kept, *tail)),
        math.fsum(value * value for value in tail),
        tuple(sorted(kept, reverse=True)),
        tuple(sorted(tail, reverse=True)),
    )


def _meets_error(
    draft: Combination, limit: float, spectra: Spectra
) -> Callable[[Joint, int], bool]:
    """Return whether a rank keeps the error below ``limit`` with the rounding of its dtype.

    The spectrum alone answers it where rounding is too small to matter; otherwise the factors
    are computed and rounded as they would be written.
    """

    def is_met(joint: Joint, rank: int) -> bool:
        expected = expected_report(joint, rank, spectra[joint.name])
        is_rounded = joint.shape.dtype in ROUNDED
        if not is_rounded and expected.relative_error < limit * CLOSE:
            return True
        if draft.is_kept(joint, {**full_ranks(draft.joints), joint.rank_group: rank}):
            return True
        return SumOfDeltas(joint, rank, draft.method).compute()[1].relative_error <= limit

    return is_met


def _result_notes(
    dtypes: set[str], modules: Sequence[ModuleReport], truncation: Truncation
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
        most = math.inf if truncation.rank is None else truncation.fitted(truncation.rank)
        missed = [m for m in modules if m.relative_error > limit and m.rank < most]
        if missed:
            worst = max(m.relative_error for m in missed)
            advice = "; write them with --dtype float32" if dtypes & ROUNDED else ""
            notes.append(
                f"{len(missed)} modules miss --max-error {limit:g} for the rounding to their "
                f"dtype alone (up to {worst:.3g}){advice}"
            )
    elif not any(module.discarded for module in modules):
        total = math.fsum(module.squared_norm for module in modules)
        error = math.fsum(module.squared_error for module in modules)
        if total and math.sqrt(error / total) > 1e-4 and dtypes & ROUNDED:
            notes.append(
                f"rounding to {', '.join(sorted(dtypes))} costs {math.sqrt(error / total):.2g}; "
                "write float32 with --dtype float32 for none"
            )
    return notes


def _part(progress: Progress | None, part: int, parts: int) -> Progress | None:
    """Return a callback that reports one of several passes over the same input."""
    if progress is None:
        return None
    return lambda done, total: progress(part * total + done, parts * total)
