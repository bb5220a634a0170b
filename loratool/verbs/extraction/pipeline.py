"""From a draft to an extracted adapter: decompose, choose ranks, write, report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter.model import FUSED_PARAMETERS, Kind
from loratool.display.figures import counted
from loratool.errors import BaseModelError
from loratool.files.atomic import kept, staged
from loratool.files.inputs import InputFiles, Stamp
from loratool.math.krylov import basis_size
from loratool.plan.adapter import AdapterPlan
from loratool.plan.devices import gpus_for
from loratool.plan.plan import write as write_plan
from loratool.plan.threads import usual_threads
from loratool.verbs.algebra.modules import Joint
from loratool.verbs.algebra.ranks import Truncation, ruling_notes, within_budget
from loratool.verbs.extraction.adapter import Difference
from loratool.verbs.extraction.decomposition import decompose_all, leftover_changes, open_spool
from loratool.verbs.extraction.difference import Extracted, ModuleResult, Settings
from loratool.verbs.extraction.pairs import Leftover, Pairing, Target
from loratool.verbs.extraction.reading import Differences, HostDifferences
from loratool.verbs.extraction.result import ExtractReport, LeftoverChange

__all__ = ["Done", "Extraction", "differences_for", "dry_run_of", "run"]

Progress = Callable[[int, int], None]
FLOPS: Final = 6e10
"""Operations a second that one processor core does in float32, roughly."""
MEMORY: Final = 4_000_000_000
"""Bytes of differences at a time, as far as that leaves two threads."""
READ: Final = 2e9
"""Bytes a second that one processor core reads and subtracts."""
GPU_READ: Final = 5e9
"""Bytes a second that come from a disk to a GPU, which is what it waits for."""
GPU_START: Final = 5.0
"""Seconds until CUDA has started."""


@dataclass(frozen=True, slots=True)
class Done:
    """What several workers have done of an extraction.

    Attributes:
        spool: Where the modules are.
        changes: What the other tensors have changed by, by name.
        notes: What a user should know of it.
    """

    spool: Path
    changes: Mapping[str, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Extraction:
    """How an extraction is carried out.

    Attributes:
        settings: How modules are decomposed.
        carries: Whether changes that no factors express are written whole.
        save_spectrum: A file for the spectra.
        force: Replace an existing output.
        resume: Keep finished modules, and take up those of an interrupted run.
        device: As on the command line.
        threads: Number of modules in work at a time.
        progress: Called with how much is done and how much there is.
        done: What was done before, by whomever.
    """

    settings: Settings
    carries: bool = False
    save_spectrum: Path | None = None
    force: bool = False
    resume: bool = False
    device: str = "auto"
    threads: int | None = None
    progress: Progress | None = None
    done: Done | None = None


def dry_run_of(
    draft: Difference, pairing: Pairing, truncation: Truncation, device: str, threads: int | None
) -> ExtractReport:
    """Say what headers tell: modules, the largest ranks, bytes, and roughly the time."""
    ranks = largest_ranks(draft.joints, truncation)
    plan = draft.plan(ranks)
    sizes = [target.nbytes for target in pairing.targets]
    read = sum(sizes)
    gpus, told = _devices(device, read, is_dora=draft.is_dora)
    at_a_time = _threads(pairing.targets, threads)
    bases = [
        basis_size(min(ranks[joint.rank_group], 128), (target.out, target.columns))
        for target, joint in zip(pairing.targets, draft.joints, strict=True)
    ]
    elements = [target.tuned.spec.elements for target in pairing.targets]
    work = math.fsum(4.0 * size * basis for size, basis in zip(elements, bases, strict=True))
    seconds = GPU_START + read / GPU_READ
    gpu_memory = None
    if gpus:
        from loratool.verbs.extraction.gpu import gpu_memory as memory_of

        sides = [target.out + target.columns for target in pairing.targets]
        gpu_memory = memory_of(elements, bases, sides)
    else:
        seconds = (work / FLOPS + read / READ) / at_a_time
    notes = [*pairing.notes, *plan.notes, *([told] if told else [])]
    if truncation.rank is None:
        notes.append("ranks depend on the values: those shown are the most there can be")
    return ExtractReport(
        modules=tuple(
            ModuleResult(joint.name, ranks[joint.rank_group], 0.0, 0.0, (), (), 0.0)
            for joint in draft.joints
        ),
        leftovers=tuple(LeftoverChange(i.name, i.why, None, False) for i in pairing.leftovers),
        unchanged=0,
        plan=plan,
        shapes=tuple((joint.shape.out, joint.shape.columns) for joint in draft.joints),
        is_written=False,
        output=draft.options.output,
        device=", ".join(map(str, gpus)) or "cpu",
        seconds=seconds,
        gpu_memory=gpu_memory,
        at_a_time=at_a_time,
        notes=tuple(notes),
    )


def largest_ranks(joints: Sequence[Joint], truncation: Truncation) -> dict[str, int]:
    """Return the largest rank that each module may get, by rank group."""
    ranks: dict[str, int] = {}
    for joint in joints:
        side = joint.shape.smallest_side
        most = truncation.fitted(min(truncation.rank or side, side))
        ranks[joint.rank_group] = max(ranks.get(joint.rank_group, 1), most)
    return ranks


def run(draft: Difference, pairing: Pairing, how: Extraction) -> ExtractReport:
    """Decompose, choose ranks, write and report.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    truncation, output = how.settings.truncation, draft.options.output
    # What the scheme cannot express is refused before the work.
    largest = largest_ranks(draft.joints, truncation)
    modules: dict[str, Extracted] = {}
    draft = replace(draft, modules=modules)
    plan = draft.plan(largest)
    stamps = {s.path: s.stamp for model in (draft.base, draft.tuned) for s in model.shards}
    with ExitStack() as stack:
        files = InputFiles(stamps)
        stack.callback(files.close)
        differences, told = differences_for(
            pairing.targets, how.device, how.threads, how.settings.variant, stack
        )
        settings = replace(how.settings, differences=differences)
        spool = how.done.spool if how.done is not None else None
        if how.resume:
            spool = stack.enter_context(kept(output))
            open_spool(spool, _run_key(draft, stamps, differences.device))
        found = decompose_all(pairing.targets, settings, files, spool, progress=how.progress)
        items = [*pairing.leftovers, *pairing.saved]
        if how.done is not None:
            changes: Mapping[str, float] = how.done.changes
        else:
            changes = leftover_changes(items, files, threads=how.threads)
        leftovers, carried = _settle(pairing, changes, draft.tuned.tensors, carry=how.carries)
        modules |= {module.name: module for module in found if module.parts}
        if not modules and not carried:
            raise BaseModelError(
                draft.tuned.path,
                "differs from the base in nothing that was selected",
                hint="--dry-run lists what is selected and what is left over",
            )
        draft = replace(
            draft,
            carried=carried,
            targets=[target for target in pairing.targets if target.name in modules],
        )
        ranks = _ranks(draft, truncation)
        while short := _cut_short(draft, truncation, ranks):
            more = decompose_all(
                pairing.targets,
                settings,
                files,
                spool,
                progress=how.progress,
                budget_ranks=short,
            )
            modules |= {module.name: module for module in more}
            ranks = _ranks(draft, truncation)
        files.check_unchanged()
        if ranks != largest or len(modules) < len(found) or carried != pairing.saved:
            plan = draft.plan(ranks)
        inputs = [draft.base.path, draft.tuned.path]
        outcome = write_plan(plan, output, inputs=inputs, force=how.force, threads=how.threads)
        results = [
            outcome.reports[joint.name]
            if ranks[joint.rank_group]
            else _left_out(modules[joint.name])
            for joint in draft.joints
        ]
        report = ExtractReport(
            modules=tuple(results),
            leftovers=tuple(leftovers),
            unchanged=len(found) - len(modules),
            plan=plan,
            shapes=tuple((joint.shape.out, joint.shape.columns) for joint in draft.joints),
            is_written=True,
            output=output,
            device=differences.device,
            at_a_time=differences.threads or 1,
            notes=(
                *pairing.notes,
                *plan.notes,
                *told,
                *differences.notes,
                *_tie_notes(plan),
                *ruling_notes(
                    truncation, ((m.rank, m.squared_norm, m.squared_error) for m in results)
                ),
                *_notes(results, leftovers, how, draft.clamp),
                *(how.done.notes if how.done is not None else ()),
            ),
        )
        if how.save_spectrum is not None:
            _write_spectrum(how.save_spectrum, report, force=how.force)
    return report


def differences_for(
    targets: Sequence[Target],
    device: str,
    threads: int | None,
    variant: str,
    stack: ExitStack,
) -> tuple[Differences, tuple[str, ...]]:
    """Return where differences are formed, and what to tell of the choice.

    Args:
        targets: What is to be decomposed.
        device: As on the command line.
        threads: Number of modules in work at a time.
        variant: ``lora`` or ``dora``.
        stack: What ends it.
    """
    sizes = [target.nbytes for target in targets]
    gpus, told = _devices(device, sum(sizes), is_dora=variant == "dora")
    notes = (told,) if told else ()
    if not gpus:
        return HostDifferences(_threads(targets, threads)), notes
    from loratool.verbs.extraction.gpu import GpuDifferences

    return stack.enter_context(GpuDifferences(gpus)), notes


def _devices(name: str, nbytes: int, *, is_dora: bool) -> tuple[list[Any], str | None]:
    """Return the GPUs to use, none for the processor, and what to tell of it."""
    gpus, told = gpus_for(name, nbytes)
    if is_dora and gpus:
        return [], "a DoRA is found by the processor"
    return gpus, told


def _threads(targets: Sequence[Target], wanted: int | None) -> int:
    """Return how many modules the processor has in work at a time."""
    if wanted is not None:
        return wanted
    elements = [target.tuned.spec.elements // target.experts for target in targets]
    most = max(2, MEMORY // (4 * max(elements, default=1)))
    return min(most, usual_threads([target.nbytes for target in targets], None))


def _left_out(module: Extracted) -> ModuleResult:
    """Return the result of a module that the budget leaves no rank for."""
    norm = module.squared_norm
    values = tuple(sorted((v for one in module.values for v in one), reverse=True))
    return ModuleResult(module.name, 0, norm, norm, (), values, module.floor)


def _tie_notes(plan: AdapterPlan) -> list[str]:
    """Return a warning where PEFT is known not to tie embedding and head again."""
    heads = {item.part.up.shape[0] for item in plan.parts if not item.part.is_target}
    tables = [
        item.part.module
        for item in plan.parts
        if item.part.kind is Kind.EMBEDDING and item.part.down.shape[1] in heads
    ]
    if not tables or tables[0].endswith("embed_tokens"):
        return []
    return [
        f"{tables[0]!r} is tied to the head; PEFT ties only embeddings called embed_tokens again, "
        "so load the adapter merged (loratool merge), or save the module whole (--save-module)"
    ]


def _run_key(draft: Difference, stamps: Mapping[Path, Stamp], device: str) -> dict[str, Any]:
    """Return what tells one run from another, for modules that are taken up again."""
    return {
        "device": device,
        "inputs": {str(path.resolve()): list(stamp) for path, stamp in stamps.items()},
        # Lengths are those of rounded factors; plain factors are rounded when they are written.
        "options": {
            name: value for name, value in draft.asked.items() if draft.is_dora or name != "dtype"
        },
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


def _ranks(draft: Difference, truncation: Truncation) -> dict[str, int]:
    """Return the rank of each module, by rank group."""
    modules, joints = draft.modules, draft.joints
    if truncation.max_size is not None:
        limits: dict[str, int] = {}
        for joint in joints:
            most = truncation.fitted(len(modules[joint.name].profile))
            limits[joint.rank_group] = max(limits.get(joint.rank_group, 1), most)
        profiles = {joint.name: modules[joint.name].profile for joint in joints}
        is_whole = draft.scheme.paths.is_whole
        return within_budget(
            joints, truncation, profiles, limits, plan_for=draft.plan, is_whole=is_whole
        )
    ranks: dict[str, int] = {}
    for joint in joints:
        rank = truncation.fitted(modules[joint.name].rank)
        ranks[joint.rank_group] = max(ranks.get(joint.rank_group, 1), rank)
    return ranks


def _cut_short(
    draft: Difference, truncation: Truncation, ranks: Mapping[str, int]
) -> dict[str, int]:
    """Return the modules that a budget gives all ranks that are known, and how many to look at.

    Once none are left, the ranks are those that all singular values would lead to.
    """
    if truncation.max_size is None or truncation.rank is not None:
        return {}
    found: dict[str, int] = {}
    for target, joint in zip(draft.targets, draft.joints, strict=True):
        known = draft.modules[joint.name].computed
        if target.smallest_side > known < ranks[joint.rank_group] + truncation.multiple:
            found[joint.name] = 2 * known
    return found


def _notes(
    results: Sequence[ModuleResult],
    leftovers: Sequence[LeftoverChange],
    how: Extraction,
    clamp: float | None,
) -> list[str]:
    notes = []
    truncation = how.settings.truncation
    if how.settings.auto and results:
        floor = max(result.floor for result in results)
        notes.append(
            "ranks end where singular values meet what rounding the finetuned weights to their "
            f"dtype leaves by itself (up to {floor:.3g})"
        )
    plain = [result.squared_plain for result in results if result.squared_plain is not None]
    if plain:
        total = math.fsum(result.squared_norm for result in results)
        lost = math.fsum(result.squared_error for result in results)
        errors = [math.sqrt(value / total) for value in (lost, math.fsum(plain))]
        notes.append(
            f"DoRA leaves a relative error of {errors[0]:.4g}, plain LoRA of the same ranks one of "
            f"{errors[1]:.4g}"
        )
    if clamp is not None:
        notes.append("the factors were clamped as asked; the errors include what that costs")
    missing = [item for item in leftovers if not item.is_carried]
    if missing:
        notes.append(
            f"{counted(len(missing), 'changed tensor')} left out of the adapter, such as "
            f"{missing[0].name!r} ({missing[0].why})"
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
    unknown = [item for item in missing if item.squared_change is None]
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
