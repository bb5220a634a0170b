"""From a draft to an extracted adapter: decompose, choose ranks, write, report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.adapter.model import FUSED_PARAMETERS
from loratool.errors import BaseModelError
from loratool.files.atomic import kept, scratch, staged
from loratool.files.inputs import InputFiles, Stamp
from loratool.ops.algebra.plan import AdapterPlan
from loratool.ops.algebra.ranks import Truncation, within_budget
from loratool.ops.extraction.drafting import ExtractionDraft
from loratool.ops.extraction.pairing import Leftover, Pairing
from loratool.ops.extraction.result import ExtractReport, LeftoverChange
from loratool.ops.importing import import_torch

if TYPE_CHECKING:
    from loratool.ops.extraction.computing import Extracted
    from loratool.ops.extraction.running import ModuleResult

__all__ = ["dry_run_of", "run"]

Progress = Callable[[int, int], None]
FLOPS: Final = 2e10
"""Operations a second that one processor core does in float32, roughly."""
PASSES: Final = 8
"""Products with the whole difference that one decomposition takes, roughly."""


def dry_run_of(
    draft: ExtractionDraft, pairing: Pairing, truncation: Truncation, threads: int | None
) -> ExtractReport:
    """Say what headers tell: modules, the largest ranks, bytes, and roughly the time."""
    from loratool.ops.extraction.running import ModuleResult

    ranks: dict[str, int] = {}
    for joint in draft.joints:
        most = min(truncation.rank or joint.smallest_side, joint.smallest_side)
        ranks[joint.rank_group] = max(ranks.get(joint.rank_group, 1), truncation.fitted(most))
    plan = draft.plan(ranks)
    work = math.fsum(
        2.0 * PASSES * target.tuned.spec.elements * (min(ranks[joint.rank_group], 128) + 8)
        for target, joint in zip(pairing.targets, draft.joints, strict=True)
    )
    read = math.fsum(target.nbytes for target in pairing.targets)
    seconds = work / FLOPS / max(1, threads or 2) + read / 1e9
    notes = list(pairing.notes)
    if truncation.rank is None:
        notes.append("ranks depend on the values: those shown are the most there can be")
    return ExtractReport(
        modules=tuple(
            ModuleResult(job.joint.name, job.output.rank, 0.0, 0.0, (), (), 0.0)
            for job in plan.jobs
        ),
        leftovers=tuple(LeftoverChange(i.name, i.why, None, False) for i in pairing.leftovers),
        unchanged=0,
        plan=plan,
        is_written=False,
        seconds=seconds,
        notes=tuple(notes),
    )


def run(
    draft: ExtractionDraft,
    pairing: Pairing,
    truncation: Truncation,
    *,
    is_auto: bool,
    residual: str,
    method: str,
    seed: int,
    clamp: float | None,
    save_spectrum: Path | None,
    force: bool,
    resume: bool,
    device: str,
    threads: int | None,
    progress: Progress | None,
) -> ExtractReport:
    """Decompose, choose ranks, write and report; see :func:`loratool.ops.extract.extract`."""
    import_torch()
    from loratool.ops.algebra.writing import TensorWriter, fill_adapter, is_synced
    from loratool.ops.extraction.computing import Settings
    from loratool.ops.extraction.running import (
        ModuleResult,
        decompose_all,
        leftover_changes,
        open_spool,
        write_modules,
    )
    from loratool.ops.tensors import resolve_device

    settings = Settings(truncation, is_auto, method, seed, resolve_device(device))
    stamps = {s.path: s.stamp for model in (draft.base, draft.tuned) for s in model.shards}
    results: list[ModuleResult] = []
    with ExitStack() as stack:
        files = InputFiles(stamps)
        stack.callback(files.close)
        spool = stack.enter_context((kept if resume else scratch)(draft.output))
        open_spool(spool, _run_key(draft, stamps))
        found = decompose_all(
            pairing.targets, settings, files, spool, threads=threads, progress=progress
        )
        changes = leftover_changes([*pairing.leftovers, *pairing.saved], files, threads=threads)
        leftovers, carried = _settle(
            pairing, changes, draft.tuned.tensors, carry=residual == "carry"
        )
        modules = {module.name: module for module in found if module.path is not None}
        if not modules and not carried:
            raise BaseModelError(
                draft.tuned.path,
                "differs from the base in nothing that was selected",
                hint="--dry-run lists what is selected and what is left over",
            )
        draft.carried = carried
        draft.targets = [target for target in pairing.targets if target.name in modules]
        draft.joints = [joint for joint in draft.joints if joint.name in modules]
        ranks = _ranks(draft, truncation, modules)
        while short := _cut_short(draft, truncation, modules, ranks):
            more = decompose_all(
                pairing.targets,
                settings,
                files,
                spool,
                threads=threads,
                progress=progress,
                budget_ranks=short,
            )
            modules |= {module.name: module for module in more}
            ranks = _ranks(draft, truncation, modules)
        plan = draft.plan(ranks)

        def fill(writer: TensorWriter) -> None:
            results.extend(write_modules(plan, modules, writer, clamp=clamp, threads=threads))

        with staged(
            draft.output, folder=plan.is_folder, force=force, sync=is_synced(plan)
        ) as place:
            fill_adapter(plan, place, files, fill)
            written = {result.module for result in results}
            results += [
                ModuleResult(m.name, 0, m.squared_norm, m.squared_norm, (), _all_values(m), m.floor)
                for m in modules.values()
                if m.name not in written
            ]
            report = ExtractReport(
                modules=tuple(results),
                leftovers=tuple(leftovers),
                unchanged=len(found) - len(modules),
                plan=plan,
                is_written=True,
                notes=(
                    *pairing.notes,
                    *_tie_notes(plan),
                    *_notes(results, leftovers, truncation, is_auto=is_auto, clamp=clamp),
                ),
            )
            if save_spectrum is not None:
                _write_spectrum(save_spectrum, report, force=force)
    return report


def _tie_notes(plan: AdapterPlan) -> list[str]:
    """Return a warning where PEFT is known not to tie embedding and head again."""
    tables = [job.joint.twin_of for job in plan.jobs if job.route == "twin"]
    if not tables or str(tables[0]).endswith("embed_tokens"):
        return []
    return [
        f"{tables[0]!r} is tied to the head; PEFT ties only embeddings called embed_tokens again, "
        "so load the adapter merged (loratool merge), or save the module whole (--save-module)"
    ]


def _all_values(module: Extracted) -> tuple[float, ...]:
    return tuple(sorted((v for one in module.values for v in one), reverse=True))


def _run_key(draft: ExtractionDraft, stamps: Mapping[Path, Stamp]) -> dict[str, Any]:
    """Return what tells one run from another, for modules that are taken up again."""
    return {
        "inputs": {str(path.resolve()): list(stamp) for path, stamp in stamps.items()},
        "options": {name: value for name, value in draft.options.items() if name != "dtype"},
    }


def _is_container(name: str, tensors: Collection[str]) -> bool:
    """Whether the module of a tensor has modules inside, or its factors in the file."""
    module = name.rpartition(".")[0]
    if not module:
        return True
    beside = [other for other in tensors if other.startswith(f"{module}.")]
    is_adapted = any(other.rpartition(".")[2] in FUSED_PARAMETERS for other in beside)
    return is_adapted or any(other.count(".") > name.count(".") for other in beside)


def _settle(
    pairing: Pairing, changes: Mapping[str, float], tensors: Collection[str], *, carry: bool
) -> tuple[list[LeftoverChange], list[Leftover]]:
    """Return what is left over, and which of it is written whole."""
    told: list[LeftoverChange] = []
    carried: list[Leftover] = []
    for item in (*pairing.saved, *pairing.leftovers):
        change = changes.get(item.name)
        if change == 0 and item not in pairing.saved:
            continue
        is_carried = item in pairing.saved or (carry and item.can_be_carried)
        is_carried = is_carried and item.tuned is not None
        why = item.why
        if is_carried and not item.name.endswith(".bias") and _is_container(item.name, tensors):
            is_carried = False
            why += "; its module holds others, and PEFT saves modules whole"
        if is_carried:
            carried.append(item)
        told.append(LeftoverChange(item.name, why, change, is_carried))
    return told, carried


def _ranks(
    draft: ExtractionDraft, truncation: Truncation, modules: Mapping[str, Extracted]
) -> dict[str, int]:
    """Return the rank of each module, by rank group."""
    if truncation.max_size is not None:
        limits: dict[str, int] = {}
        for joint in draft.joints:
            most = truncation.fitted(len(modules[joint.name].profile))
            limits[joint.rank_group] = max(limits.get(joint.rank_group, 1), most)
        profiles = {joint.name: modules[joint.name].profile for joint in draft.joints}
        return within_budget(draft.joints, truncation, profiles, limits, draft.plan)
    ranks: dict[str, int] = {}
    for joint in draft.joints:
        rank = truncation.fitted(modules[joint.name].rank)
        ranks[joint.rank_group] = max(ranks.get(joint.rank_group, 1), rank)
    return ranks


def _cut_short(
    draft: ExtractionDraft,
    truncation: Truncation,
    modules: Mapping[str, Extracted],
    ranks: Mapping[str, int],
) -> dict[str, int]:
    """Return the modules that a budget gives all ranks that are known, and how many to look at.

    Once none are left, the ranks are those that all singular values would lead to.
    """
    if truncation.max_size is None or truncation.rank is not None:
        return {}
    found: dict[str, int] = {}
    for target, joint in zip(draft.targets, draft.joints, strict=True):
        known = modules[joint.name].computed
        if target.smallest_side > known < ranks[joint.rank_group] + truncation.multiple:
            found[joint.name] = 2 * known
    return found


def _notes(
    results: Sequence[ModuleResult],
    leftovers: Sequence[LeftoverChange],
    truncation: Truncation,
    *,
    is_auto: bool,
    clamp: float | None,
) -> list[str]:
    notes = []
    if is_auto and results:
        floor = max(result.floor for result in results)
        notes.append(
            "ranks end where singular values meet what rounding the finetuned weights to their "
            f"dtype leaves by itself (up to {floor:.3g})"
        )
    if clamp is not None:
        notes.append("the factors were clamped as asked; the errors include what that costs")
    lost = [item for item in leftovers if not item.is_carried]
    if lost:
        notes.append(
            f"{len(lost)} changed tensors are not in the adapter, such as {lost[0].name!r} "
            f"({lost[0].why})"
        )
    wanted = {"max_error": truncation.max_error}
    if truncation.energy is not None:
        wanted["energy"] = math.sqrt(max(0.0, 1 - truncation.energy))
    for name, limit in wanted.items():
        if limit is None:
            continue
        missed = [r for r in results if r.relative_error > limit * (1 + 1e-6) + 1e-6]
        if missed:
            worst = max(r.relative_error for r in missed)
            notes.append(
                f"{len(missed)} modules miss --{name.replace('_', '-')} for the limit of ranks "
                f"or the rounding to their dtype (error up to {worst:.3g})"
            )
    unknown = [item for item in lost if item.squared_change is None]
    if unknown:
        notes.append(
            f"{len(unknown)} of them cannot be compared with the base and have no share in the "
            "figures"
        )
    noisy = [r for r in results if r.computed and 0 < r.computed[0] < 2 * r.floor]
    if noisy:
        notes.append(
            f"{len(noisy)} modules differ by hardly more than rounding, such as {noisy[0].module!r}"
        )
    return notes


def _write_spectrum(path: Path, report: ExtractReport, *, force: bool) -> None:
    """Write the spectra that were computed, for ranks that are chosen later."""
    document = {
        "schema": 1,
        "modules": [
            {
                "module": module.module,
                "squared_norm": module.squared_norm,
                "noise_floor": module.floor,
                "singular_values": list(module.computed),
            }
            for module in report.modules
        ],
    }
    with staged(path, folder=False, force=force, sync=False) as place:
        place.write_text(json.dumps(document, indent=1) + "\n")
