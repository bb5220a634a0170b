"""``extract``: the difference of a finetuned model and its base, as an adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.errors import BaseModelError, OptionError
from loratool.files.atomic import check_output, kept, scratch, staged
from loratool.files.checkpoint import open_checkpoint
from loratool.files.dtypes import OUTPUT_DTYPES
from loratool.files.inputs import InputFiles, Stamp
from loratool.ops.algebra.planning import AdapterPlan, output_scheme
from loratool.ops.algebra.ranks import Truncation, parse_size, within_budget
from loratool.ops.extraction.drafting import ExtractionDraft
from loratool.ops.extraction.pairing import Leftover, Pairing, Selection, pair
from loratool.ops.importing import import_torch
from loratool.ops.merging.mergeable import check_base
from loratool.ops.plan import TORCH_BYTES

if TYPE_CHECKING:
    from loratool.ops.extraction.computing import Extracted
    from loratool.ops.extraction.running import ModuleResult

__all__ = ["ExtractReport", "LeftoverChange", "extract"]

AnyPath = str | PathLike[str]
Progress = Callable[[int, int], None]
METHODS: Final = ("auto", "exact", "randomised")
RESIDUALS: Final = ("report", "carry")
FLOPS: Final = 2e10
"""Operations a second that one processor core does in float32, roughly."""
COPIES: Final = 2
PASSES: Final = 8
"""Products with the whole difference that one decomposition takes, roughly."""


@dataclass(frozen=True, slots=True)
class LeftoverChange:
    """A tensor that no factors stand for.

    Attributes:
        name: Its name.
        why: Why it is left over.
        squared_change: ``‖tuned - base‖²``; ``None`` where the two cannot be compared.
        is_carried: Whether the finetuned tensor is in the adapter whole.
    """

    name: str
    why: str
    squared_change: float | None
    is_carried: bool


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction found and wrote.

    Attributes:
        modules: What was written for each module that changed.
        leftovers: What changed and is not in the factors.
        unchanged: How many selected modules did not change at all.
        plan: What was decided.
        is_written: Whether it was written.
        seconds: For a dry run: roughly how long it would take.
        notes: What a user should know.
    """

    modules: tuple[ModuleResult, ...]
    leftovers: tuple[LeftoverChange, ...]
    unchanged: int
    plan: AdapterPlan
    is_written: bool
    seconds: float | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def peak_memory(self) -> int:
        """Bytes of memory that it takes at most, roughly: torch, and two differences at work."""
        sizes = [job.output.out * math.prod(job.output.into) for job in self.plan.jobs]
        return TORCH_BYTES + sum(COPIES * 4 * size for size in sorted(sizes, reverse=True)[:2])

    @property
    def relative_error(self) -> float:
        """``‖written - Δ‖ / ‖Δ‖`` over the modules that changed."""
        total = math.fsum(module.squared_norm for module in self.modules)
        error = math.fsum(module.squared_error for module in self.modules)
        return math.sqrt(error / total) if total else 0.0

    @property
    def total_change(self) -> float:
        """``‖tuned - base‖²`` over everything that could be compared."""
        left = math.fsum(item.squared_change or 0.0 for item in self.leftovers)
        return left + math.fsum(module.squared_norm for module in self.modules)

    @property
    def captured(self) -> float:
        """The share of the total squared change that the adapter holds."""
        total = self.total_change
        lost = math.fsum(module.squared_error for module in self.modules) + math.fsum(
            item.squared_change or 0.0 for item in self.leftovers if not item.is_carried
        )
        return 1 - lost / total if total else 1.0

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises, and more."""
        total = self.total_change or 1.0
        return {
            "schema": 1,
            "dry_run": not self.is_written,
            "relative_error": self.relative_error,
            "captured": self.captured,
            "unchanged": self.unchanged,
            "modules": [
                {
                    "module": module.module,
                    "rank": module.rank,
                    "relative_error": module.relative_error,
                    "singular_values": list(module.singular_values),
                    "frobenius_norm": math.sqrt(module.squared_norm),
                    "share_of_change": module.squared_norm / total,
                    "noise_floor": module.floor,
                }
                for module in self.modules
            ],
            "leftovers": [
                {
                    "name": item.name,
                    "why": item.why,
                    "share_of_change": None
                    if item.squared_change is None
                    else item.squared_change / total,
                    "carried": item.is_carried,
                }
                for item in self.leftovers
            ],
            "bytes_written" if self.is_written else "bytes_to_write": self.plan.nbytes,
            "tensors": len(self.plan.specs),
            "dropped": [{"name": name, "why": why} for name, why in self.plan.dropped],
            "files": self.plan.described_files(),
            "seconds_expected": self.seconds,
            "peak_memory": self.peak_memory,
            "notes": list(self.notes),
        }


def extract(
    base: AnyPath,
    finetuned: AnyPath,
    output: AnyPath,
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    max_size: int | str | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | None = None,
    sv_cumulative: float | None = None,
    rank_multiple: int = 1,
    to: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    save_module: Sequence[str] = (),
    residual: str = "report",
    method: str = "auto",
    seed: int = 0,
    clamp_quantile: float | None = None,
    save_spectrum: AnyPath | None = None,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> ExtractReport:
    """Turn ``finetuned - base`` into an adapter, module by module.

    Differences are formed in float32 and decomposed by a randomised block Krylov method, or
    exactly where matrices are small. The error of every module is measured, not estimated.

    Args:
        base: Folder or file of the base.
        finetuned: Folder or file of the finetuned model.
        output: Where the adapter goes: a folder, or a file for schemes without a configuration.
        rank: At most this rank in every module, or ``"auto"``: as far as the spectrum stands
            out of the rounding noise of the stored dtype. A number may limit the following.
        energy: Smallest rank that keeps this share of ``‖Δ‖_F²`` in each module.
        max_error: Smallest rank with at most this relative Frobenius error in each module.
        max_size: Bytes of the weights file, spread over the modules for the smallest error.
        sv_ratio: Keep the singular values above ``σ₁ / sv_ratio``.
        sv_fro: Smallest rank that keeps this share of ``‖Δ‖_F``.
        sv_cumulative: Smallest rank that keeps this share of the sum of the singular values.
        rank_multiple: Make every rank a multiple of this.
        to: The scheme to write; by default ``peft``.
        include: Regular expressions; only modules that match one anywhere are extracted.
        exclude: Regular expressions; modules that match one anywhere are not.
        embeddings: Extract embeddings and the output head too.
        save_module: Modules (paths or dotted suffixes) that are saved whole.
        residual: What becomes of changes that no factors express: ``report``, or ``carry``
            them whole where the scheme has a place for them.
        method: ``auto``, ``exact`` or ``randomised``.
        seed: Of the randomised method.
        clamp_quantile: Clamp the factors as kohya's extraction does; it costs accuracy, and
            how much is in the report.
        save_spectrum: A file for the spectra; :func:`truncate` reads it to choose ranks later.
        dtype: ``float32``, ``float16`` or ``bfloat16``; by default that of the finetuned model.
        force: Replace an existing output.
        dry_run: Say what would be done, from headers alone.
        resume: Keep finished modules beside the output if the run is interrupted, and take
            up those of an interrupted run.
        device: ``auto`` (the processor), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: Number of modules in work at a time.
        progress: Called with how much is done and how much there is.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    is_auto = rank == "auto"
    if isinstance(rank, str) and not is_auto:
        raise OptionError("--rank", f"{rank!r} is neither a number nor auto")
    size = parse_size(max_size) if max_size is not None else None
    limit = rank if isinstance(rank, int) else None
    truncation = Truncation(
        limit, energy, max_error, size, sv_ratio, sv_fro, sv_cumulative, rank_multiple
    )
    _check_options(
        truncation, is_auto=is_auto, method=method, residual=residual, clamp=clamp_quantile
    )
    place = Path(output)
    checkpoints = [open_checkpoint(Path(path)) for path in (base, finetuned)]
    for checkpoint in checkpoints:
        check_base(checkpoint)
    inputs = [Path(base), Path(finetuned)]
    if not dry_run:
        check_output(place, force=force, inputs=inputs)
        if save_spectrum is not None:
            check_output(Path(save_spectrum), force=force, inputs=[*inputs, place])
    selection = Selection.of(include, exclude, save_module, embeddings=embeddings)
    pairing = pair(checkpoints[0], checkpoints[1], selection)
    _check_pairing(pairing, checkpoints[1].path, save_module)
    options = {
        "rank": rank,
        "energy": energy,
        "max_error": max_error,
        "max_size": size,
        "sv_ratio": sv_ratio,
        "sv_fro": sv_fro,
        "sv_cumulative": sv_cumulative,
        "rank_multiple": rank_multiple if rank_multiple > 1 else None,
        "to": to,
        "include": tuple(include),
        "exclude": tuple(exclude),
        "embeddings": embeddings or None,
        "save_module": tuple(save_module),
        "residual": residual,
        "method": method,
        "seed": seed,
        "clamp_quantile": clamp_quantile,
        "dtype": dtype,
    }
    draft = ExtractionDraft(
        base=checkpoints[0],
        tuned=checkpoints[1],
        targets=pairing.targets,
        carried=pairing.saved,
        scheme=output_scheme((), to or "peft"),
        output=place,
        options=options,
        dtype=OUTPUT_DTYPES[dtype] if dtype else None,
    )
    if dry_run:
        return _dry_run(draft, pairing, truncation, threads)
    return _run(
        draft,
        pairing,
        truncation,
        is_auto=is_auto,
        residual=residual,
        method=method,
        seed=seed,
        clamp=clamp_quantile,
        save_spectrum=Path(save_spectrum) if save_spectrum is not None else None,
        force=force,
        resume=resume,
        device=device,
        threads=threads,
        progress=progress,
    )


def _check_options(
    truncation: Truncation,
    *,
    is_auto: bool,
    method: str,
    residual: str,
    clamp: float | None,
) -> None:
    if is_auto and (truncation.rule is not None or truncation.max_size is not None):
        raise OptionError("--rank", "auto and another rule both decide about ranks")
    if not is_auto and not truncation.is_given:
        raise OptionError("extract", "say how far: --rank, --energy, --max-error or --max-size")
    if method not in METHODS:
        raise OptionError("--method", f"{method!r} is none of {', '.join(METHODS)}")
    if residual not in RESIDUALS:
        raise OptionError("--residual", f"{residual!r} is none of {', '.join(RESIDUALS)}")
    if clamp is not None and not 0.5 < clamp <= 1:
        raise OptionError("--clamp-quantile", f"{clamp:g} is not in (0.5, 1]")


def _check_pairing(pairing: Pairing, path: Path, save_module: Sequence[str]) -> None:
    if not pairing.same and not pairing.saved:
        raise BaseModelError(
            path,
            "has no tensor in common with the base",
            hint="are these two the same kind of model? The base comes first",
        )
    for name in save_module:
        if not any(_is_of(item, name) for item in pairing.saved):
            raise OptionError("--save-module", f"the finetuned model has no module {name!r}")


def _is_of(item: Leftover, name: str) -> bool:
    module = item.name.rpartition(".")[0]
    return module == name or module.endswith(f".{name}")


def _dry_run(
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


def _run(
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
        leftovers, carried = _settle(pairing, changes, carry=residual == "carry")
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
        plan = draft.plan(_ranks(draft, truncation, modules))

        def fill(writer: TensorWriter) -> None:
            results.extend(write_modules(plan, modules, writer, clamp=clamp, threads=threads))

        with staged(
            draft.output, folder=plan.is_folder, force=force, sync=is_synced(plan)
        ) as place:
            fill_adapter(plan, place, files, fill)
    written = {result.module for result in results}
    results += [
        ModuleResult(m.name, 0, m.squared_norm, m.squared_norm, (), (), m.floor)
        for m in modules.values()
        if m.name not in written
    ]
    report = ExtractReport(
        modules=tuple(results),
        leftovers=tuple(leftovers),
        unchanged=len(found) - len(modules),
        plan=plan,
        is_written=True,
        notes=(*pairing.notes, *_notes(results, leftovers, is_auto=is_auto, clamp=clamp)),
    )
    if save_spectrum is not None:
        _write_spectrum(save_spectrum, report, force=force)
    return report


def _run_key(draft: ExtractionDraft, stamps: Mapping[Path, Stamp]) -> dict[str, Any]:
    """Return what tells one run from another, for modules that are taken up again."""
    return {
        "inputs": {str(path.resolve()): list(stamp) for path, stamp in stamps.items()},
        "options": {name: value for name, value in draft.options.items() if name != "dtype"},
    }


def _settle(
    pairing: Pairing, changes: Mapping[str, float], *, carry: bool
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
        if is_carried:
            carried.append(item)
        told.append(LeftoverChange(item.name, item.why, change, is_carried))
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


def _notes(
    results: Sequence[ModuleResult],
    leftovers: Sequence[LeftoverChange],
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
    noisy = (
        [r for r in results if r.squared_norm and 0 < r.computed[0] < 2 * r.floor]
        if results
        else []
    )
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
