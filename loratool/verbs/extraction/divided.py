"""An extraction whose modules are decomposed by several workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from loratool.codecs.weights import path_of
from loratool.errors import FileFormatError, OutputExistsError
from loratool.files.atomic import check_output, sync_file
from loratool.files.inputs import InputFiles
from loratool.plan.record import is_recorded
from loratool.shards.course import ShareReport
from loratool.shards.division import Division
from loratool.shards.driver import check_on_disk, do_parts, records_of
from loratool.shards.folder import Claim, PartsFolder
from loratool.shards.job import Job, Part, Task
from loratool.shards.job import Settings as Manner
from loratool.shards.model import CUT_BYTES, marked_form, opened_part
from loratool.shards.records import differing_workers, wait_for_begin
from loratool.shards.roots import Mark, Roots
from loratool.shards.status import StatusReport
from loratool.verbs.extraction.adapter import Difference
from loratool.verbs.extraction.decomposition import decompose_all, leftover_changes, spool_name
from loratool.verbs.extraction.difference import Settings
from loratool.verbs.extraction.pairs import Leftover, Pairing, Target
from loratool.verbs.extraction.pipeline import Done, Extraction, differences_for, run
from loratool.verbs.extraction.result import ExtractReport

__all__ = ["divided_extraction", "extract_part"]

NAMES: Final = tuple(each.name for each in fields(Settings) if each.name != "differences")


@dataclass(frozen=True, slots=True)
class ExtractPart:
    """Some modules of an extraction.

    Attributes:
        targets: The modules, and which of all each is.
        leftovers: Tensors of which only the change is measured.
        settings: How modules are decomposed, by name; where is up to the worker.
    """

    targets: tuple[tuple[int, Target], ...]
    leftovers: tuple[Leftover, ...]
    settings: Mapping[str, Any]


def extract_job(draft: Difference, pairing: Pairing, settings: Settings, roots: Roots) -> Job:
    """Return the decomposition of all modules as a job.

    Args:
        draft: What is made of them.
        pairing: The modules.
        settings: How they are decomposed.
        roots: Where the two models lie.
    """
    marks: dict[Path, Mark] = {}
    parts = [
        Part(name, size, marked_form(part, roots, marks))
        for name, size, part in _parts(pairing, settings)
    ]
    asked = {name: repr(value) for name, value in sorted(draft.asked.items())}
    return Job("extract", draft.options.output, tuple(parts), asked, roots.named, extract_part)


def _parts(pairing: Pairing, settings: Settings) -> Iterator[tuple[str, int, ExtractPart]]:
    """Yield what lies in one file of the finetuned model, or some of it where that is much."""
    by_file: dict[Path, list[tuple[int, Target] | Leftover]] = {}
    for number, target in enumerate(pairing.targets):
        by_file.setdefault(path_of(target.tuned), []).append((number, target))
    for left in (*pairing.leftovers, *pairing.saved):
        weight = left.tuned if left.tuned is not None else left.base
        if weight is not None:
            by_file.setdefault(path_of(weight), []).append(left)
    for path, items in by_file.items():
        some: list[tuple[int, Target] | Leftover] = []
        size = count = 0
        for item in items:
            some.append(item)
            size += _nbytes(item)
            if size >= CUT_BYTES or item is items[-1]:
                count += 1
                name = path.name if count == 1 and item is items[-1] else f"{path.name} ({count})"
                yield name, size, _part(some, settings)
                some, size = [], 0


def _nbytes(item: tuple[int, Target] | Leftover) -> int:
    if isinstance(item, tuple):
        return item[1].nbytes
    return sum(weight.spec.nbytes for weight in (item.base, item.tuned) if weight is not None)


def _part(items: Sequence[tuple[int, Target] | Leftover], settings: Settings) -> ExtractPart:
    return ExtractPart(
        tuple(item for item in items if isinstance(item, tuple)),
        tuple(item for item in items if isinstance(item, Leftover)),
        {name: getattr(settings, name) for name in NAMES},
    )


def extract_part(task: Task) -> Mapping[str, Any]:
    """Decompose some modules; see :class:`loratool.shards.job.Work`.

    Raises:
        LoratoolError: An input changed or ended, or holds NaN or infinity.
    """
    part, stamps = opened_part(task)
    assert isinstance(part, ExtractPart)
    folder, manner = task.folder, task.settings
    targets = [target for _, target in part.targets]
    numbers = [number for number, _ in part.targets]
    with ExitStack() as stack:
        files = InputFiles(stamps)
        stack.callback(files.close)
        differences, _ = differences_for(
            targets, manner.device, manner.threads, part.settings["variant"], stack
        )
        settings = Settings(**part.settings, differences=differences)
        with folder.writing():
            decompose_all(
                targets, settings, files, folder.made, numbers=numbers, progress=task.beat
            )
        changes = leftover_changes(part.leftovers, files, threads=manner.threads)
        files.check_unchanged()
    names = [spool_name(number) for number in numbers]
    with folder.writing():
        for name in names:
            sync_file(folder.made / name)
        sizes = {name: (folder.made / name).stat().st_size for name in names}
    return {"files": sizes, "changes": changes, "device": differences.device}


def divided_extraction(
    draft: Difference,
    pairing: Pairing,
    how: Extraction,
    division: Division,
    roots: Roots,
) -> ExtractReport | ShareReport | StatusReport:
    """Do what the options say of an extraction in parts.

    Raises:
        LoratoolError: It cannot be done; parts that are done stay.
    """
    check_on_disk(draft.options.output)
    job = extract_job(draft, pairing, how.settings, roots)
    folder = PartsFolder(job.output)

    def finished() -> StatusReport:
        folder.clear()
        return StatusReport(job.output, None, job.verb)

    def finish() -> ExtractReport | StatusReport:
        if not folder.plan_path.exists() and is_recorded(job.output, draft.history):
            return finished()
        records_of(folder, job.verb, waits=division.waits, progress=how.progress)
        with folder.finishing() as claim:
            if claim is None:
                return finished()
            return made(claim)

    def made(claim: Claim) -> ExtractReport:
        document, records = records_of(folder, job.verb)
        if document["digest"] != job.digest:
            raise folder.of_another(document)
        try:
            changes = {name: value for each in records for name, value in each["changes"].items()}
        except (AttributeError, KeyError):
            raise FileFormatError(folder.path, "has records that are damaged") from None
        done = Done(folder.made, changes, tuple(differing_workers(records)))

        def tell(bytes_done: int, total: int) -> None:
            claim.beat(bytes_done)
            if how.progress is not None:
                how.progress(bytes_done, total)

        report = run(draft, pairing, replace(how, done=done, progress=tell))
        folder.remove()
        return report

    if not folder.plan_path.exists() and is_recorded(job.output, draft.history):
        return finished()
    try:
        check_output(job.output, force=how.force, inputs=[draft.base.path, draft.tuned.path])
    except OutputExistsError:
        if not is_recorded(job.output, draft.history):
            raise
        if folder.plan_path.exists() and folder.plan()["digest"] == job.digest:
            folder.remove()  # whoever has finished was killed before that
        return finished()
    if division.share is None and division.executor is None:
        if division.waits:
            wait_for_begin(folder)
        return finish()
    manner = Manner(how.device, how.threads)
    return do_parts(job, division, manner, finish, how.progress, replaces=how.force)
