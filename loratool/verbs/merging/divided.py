"""A merge, or the comparison with one, whose parts are done by several workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Final

from loratool.adapter.findings import Finding, Findings
from loratool.base.model import Model
from loratool.display.figures import counted, human_bytes
from loratool.errors import OutputExistsError
from loratool.files.atomic import check_output
from loratool.files.places import located
from loratool.files.sources import size_of
from loratool.plan.model import ModelPlan
from loratool.plan.record import is_recorded
from loratool.shards.course import ShareReport
from loratool.shards.dealing import Share, dealt
from loratool.shards.division import Division
from loratool.shards.driver import check_on_disk, do_parts, no_parts, records_of, told_by
from loratool.shards.folder import PartsFolder
from loratool.shards.job import Job, Settings
from loratool.shards.model import finish_model, model_job, model_parts
from loratool.shards.records import differing_workers, wait_for_begin
from loratool.shards.roots import Roots
from loratool.verbs.merging.compared import compare_job, compared
from loratool.verbs.merging.result import MergeReport

__all__ = ["DividedMerge", "divided_comparison", "share_note"]

AnyPath = str | PathLike[str]
SHOWN: Final = 4


@dataclass(frozen=True)
class DividedMerge:
    """A merge in parts.

    Attributes:
        planned: Plans it; not called to put together what is there.
        base: The base, as it was named.
        adapters: The adapters, as they were named.
        output: Where the model goes.
        force: Replace an existing output.
        asked: What is asked of it, as it is recorded.
        settings: How parts are done.
        progress: Called with bytes done and bytes in all.
    """

    planned: Callable[[], ModelPlan]
    base: AnyPath
    adapters: Sequence[AnyPath]
    output: Path
    force: bool
    asked: Mapping[str, Any]
    settings: Settings
    progress: Callable[[int, int], None] | None

    def carry_out(self, division: Division) -> MergeReport | ShareReport:
        """Do what the options say.

        Raises:
            LoratoolError: It cannot be done; parts that are done stay.
        """
        check_on_disk(self.output)
        folder = PartsFolder(self.output)
        is_alone = division.share is None and division.executor is None
        if is_alone and division.waits:
            wait_for_begin(folder)
        if is_alone or self._is_published(folder):
            return self._finish(folder, division)
        plan = self.planned()
        report = MergeReport.of(plan, self.output)
        if not folder.plan_path.exists() and self._is_finished(plan):
            return self._found(folder, report)
        roots = self._places
        told = {name: value for name, value in report.planned.items() if name != "steps"}
        allows = bool(self.asked["allow_nonfinite"])
        job = model_job(plan, self.output, roots, allow_nonfinite=allows, told=told)
        try:
            self._check(plan, job, folder, division)
        except OutputExistsError:
            if not self._is_finished(plan):
                raise
            return self._finished_before(folder)  # a moment ago
        done = do_parts(
            job,
            division,
            self.settings,
            lambda: self._finish(folder, division),
            self.progress,
            replaces=self.force,
        )
        if isinstance(done, ShareReport):
            return replace(done, notes=(*report.notes, *done.notes))
        return done

    @property
    def _places(self) -> Roots:
        """Return where inputs lie."""
        return _roots(self.base, self.adapters)

    def _check(self, plan: ModelPlan, job: Job, folder: PartsFolder, division: Division) -> None:
        """Make sure that the output may be written.

        Raises:
            OutputError: It may not.
        """
        done = sum(
            part.size
            for number, part in enumerate(job.parts, 1)
            if folder.record(number, job.digest) is not None
        )
        share = division.share
        count = share.count if share is not None and not share.is_auto else 1
        check_output(
            self.output,
            force=self.force,
            inputs=[plan.base, *map(located, self.adapters), *plan.inputs()],
            needed=(plan.nbytes - done) // count,
            names=[sidecar.name for sidecar in plan.others()],
            folder=plan.is_folder,
        )

    # -- the end --------------------------------------------------------------------------------

    def _finish(self, folder: PartsFolder, division: Division) -> MergeReport:
        """Make the output of the parts.

        Raises:
            OutputError: Some are missing.
        """
        if folder.plan_path.exists() and not self._is_published(folder):
            records_of(folder, "merge", waits=division.waits, progress=self.progress)
        with folder.finishing() as claim:
            if claim is None:
                return self._finished_before(folder)
            if self._is_published(folder):
                report = MergeReport.told(folder.plan().get("told") or {}, self.output)
                report = replace(report, is_written=True)
            else:
                report = self._made(folder)
            folder.remove()
        return report

    def _made(self, folder: PartsFolder) -> MergeReport:
        """Make the output of all parts."""
        document, records = records_of(folder, "merge")
        outcome = finish_model(
            folder,
            document,
            records,
            self._places,
            count=len(self.adapters),
            asked=self.asked,
            force=self.force,
        )
        report = MergeReport.told(document.get("told") or {}, self.output)
        notes = differing_workers(records)
        return report.written(outcome, quantized=self.asked["quantized"] or "", notes=notes)

    def _is_published(self, folder: PartsFolder) -> bool:
        """Whether nothing is left to do but to clear up."""
        return folder.plan_path.exists() and folder.is_published(
            folder=bool(folder.plan().get("folder"))
        )

    def _finished_before(self, folder: PartsFolder) -> MergeReport:
        """Return the report of a merge that was finished before.

        Raises:
            OutputError: It was not.
        """
        plan = self.planned()
        if not self._is_finished(plan):
            raise no_parts(folder)
        return self._found(folder, MergeReport.of(plan, self.output))

    def _found(self, folder: PartsFolder, report: MergeReport) -> MergeReport:
        """Return the report of what was there before."""
        folder.clear()
        return replace(report, is_written=True, was_there=True)

    def _is_finished(self, plan: ModelPlan) -> bool:
        """Whether the output is there, and says that it was made so."""
        paths = [self.output / file.name if plan.is_folder else self.output for file in plan.files]
        is_whole = all(
            path.is_file() and size_of(path) == file.size
            for path, file in zip(paths, plan.files, strict=True)
        )
        return is_whole and plan.history is not None and is_recorded(self.output, plan.history)


def share_note(plan: ModelPlan, share: Share) -> str:
    """Return what a share of a merge is, in words."""
    parts, _ = model_parts(plan, Roots.of({"base": plan.base}), joins=True)
    if share.is_auto:
        return f"--shards auto does whatever nobody does yet of {counted(len(parts), 'part')}"
    mine = [parts[index] for index in dealt([part.size for part in parts], share)]
    size = human_bytes(sum(part.size for part in mine))
    names = ", ".join(part.name for part in mine[:SHOWN]) + (", …" if len(mine) > SHOWN else "")
    return f"--shards {share} is {len(mine)} of {counted(len(parts), 'part')}, {size}: {names}"


def _roots(base: AnyPath, adapters: Sequence[AnyPath], **more: AnyPath) -> Roots:
    named = {"base": base} | {f"adapter {number}": path for number, path in enumerate(adapters)}
    return Roots.of(named | more)


def divided_comparison(
    plan: ModelPlan,
    merged: Model,
    found: Sequence[Finding],
    base: AnyPath,
    adapters: Sequence[AnyPath],
    division: Division,
    settings: Settings,
    progress: Callable[[int, int], None] | None,
) -> Findings | ShareReport:
    """Compare a model with a plan in parts; see :func:`loratool.verbs.verify.verify`.

    Raises:
        LoratoolError: It cannot be done; parts that are done stay.
    """
    check_on_disk(merged.path)
    roots = _roots(base, adapters, merged=merged.path)
    job = compare_job(plan, merged.path, merged.raw, found, roots)

    folder = PartsFolder(job.output)

    def finish() -> Findings | None:
        if division.share is not None and not folder.plan_path.exists():
            return None
        document, _ = records_of(folder, job.verb, waits=division.waits, progress=progress)
        if document["digest"] != job.digest:
            raise folder.of_another(document)
        with folder.finishing() as claim:
            if claim is None:
                return None
            findings = compared(*records_of(folder, job.verb))
            folder.remove()
        return findings

    if division.share is None and division.executor is None:
        if division.waits:
            wait_for_begin(folder, makes_output=False)
        return told_by(finish, folder)
    return do_parts(job, division, settings, finish, progress)
