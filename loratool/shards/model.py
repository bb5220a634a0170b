"""The parts of a model's plan: files, or ranges of large ones, that nobody else writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from loratool.errors import FileFormatError
from loratool.files.atomic import sync_file
from loratool.files.checkpoint import is_index
from loratool.files.inputs import Stamp
from loratool.files.places import called
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.plan.devices import exactly
from loratool.plan.digests import digest_tasks
from loratool.plan.history import History, Source
from loratool.plan.lanes import Spot
from loratool.plan.model import ModelPlan, OutputFile, Step, refuse_empty, task_of
from loratool.plan.outcome import Outcome
from loratool.plan.run import FileWork, RunResult, joined_ranges, write_files
from loratool.plan.sidecar import Sidecar, write_sidecar
from loratool.shards.folder import PartsFolder, is_inside
from loratool.shards.forms import DAMAGED, as_form, from_form
from loratool.shards.job import Job, Part, Task
from loratool.shards.roots import Mark, Roots, check_marks, mark_of

__all__ = [
    "CUT_BYTES",
    "Closing",
    "ModelPart",
    "PartFile",
    "finish_model",
    "marked_form",
    "model_job",
    "model_parts",
    "opened_part",
    "outcome_of",
    "write_part",
]

CUT_ABOVE: Final = 4_000_000_000
"""Bytes of an output file from which on several workers write it.

That of 163 files of 4.3 GB: whole, 32 workers would do some six and some five each.
"""
CUT_BYTES: Final = 2_000_000_000
"""Bytes of what each of them writes at most, roughly."""
BYTES: Final = "U8"


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes that are copied: a tensor, or several that follow each other.

    Attributes:
        file: Index of the file of the part.
        spec: What they are.
        source: Where they are from.
        begin: Where they begin there.
        offset: Where they go.
    """

    file: int
    spec: TensorSpec
    source: Path
    begin: int
    offset: int


@dataclass(frozen=True, slots=True)
class PartFile:
    """A file that a part writes, or some of it.

    Attributes:
        name: Its name in the output folder.
        size: Its size in bytes.
        header: What it begins with, where that is not copied.
        original: An input that it equals but for what is computed, where this part writes all.
        sealed: What writes its header, once the hashes in that are known.
    """

    name: str
    size: int
    header: bytes = b""
    original: Path | None = None
    sealed: OutputFile | None = None


@dataclass(frozen=True)
class ModelPart:
    """Some of a model's plan.

    Attributes:
        files: The files that it writes.
        moves: What is copied.
        steps: What is computed.
        places: Where that goes: the number of the file, and the offset there, by name.
        spots: The same of what several tensors are written of at once, with what these are.
        hashed: Inputs that it hashes for the record.
        is_shared: Whether others write the same files.
        allow_nonfinite: Whether NaN and infinity are written where they come out.
    """

    files: tuple[PartFile, ...]
    moves: tuple[Move, ...]
    steps: tuple[Step, ...]
    places: Mapping[str, tuple[int, int]]
    spots: Mapping[str, Spot]
    hashed: tuple[Path, ...] = ()
    is_shared: bool = False
    allow_nonfinite: bool = False

    @property
    def all_spots(self) -> dict[str, Spot]:
        """Where everything goes that is computed, by name."""
        specs = {step.spec.name: step.spec for step in self.steps}
        plain = {name: Spot(specs[name], *place) for name, place in self.places.items()}
        return {**plain, **self.spots}

    def works(self, outcome: Outcome) -> list[FileWork]:
        """Return what is to be done for each of its files."""
        moves: list[list[tuple[Spot, StoredTensor]]] = [[] for _ in self.files]
        for move in self.moves:
            stored = StoredTensor(move.spec, move.source, move.begin)
            moves[move.file].append((Spot(move.spec, move.file, move.offset), stored))
        works = [
            FileWork(file.name, file.size, file.header, mine, [], file.original)
            for file, mine in zip(self.files, moves, strict=True)
        ]
        spots = self.all_spots
        for step in self.steps:
            task = task_of(step, spots)
            assert task is not None
            number = spots[step.spec.name].file
            works[number] = replace(works[number], tasks=[*works[number].tasks, task])
        history = History("", (Source("", self.hashed),)) if self.hashed else None
        hashing = digest_tasks(history, outcome)
        works[-1] = replace(works[-1], tasks=[*works[-1].tasks, *hashing])
        return works


def model_parts(
    plan: ModelPlan,
    roots: Roots,
    *,
    joins: bool,
    allow_nonfinite: bool = False,
    as_value: Callable[[ModelPart, Sequence[Step]], Any] = lambda part, steps: part,
) -> tuple[list[Part], list[str]]:
    """Return the parts of a plan, and the names of the files that several of them write.

    Args:
        plan: The plan.
        roots: Where inputs lie.
        joins: Whether tensors that are copied and follow each other are one.
        allow_nonfinite: Whether NaN and infinity are written.
        as_value: Returns what whoever does a part is given, of the part and all of its steps.
    """
    parts: list[Part] = []
    shared: list[str] = []
    marks: dict[Path, Mark] = {}
    groups = list(_groups(plan.files))
    for files in groups:
        pieces = list(_pieces(files))
        spots = {s.spec.name: s for n, file in enumerate(files) for s in file.spots(n)}
        is_shared = len(pieces) > 1
        shared += [file.name for file in files if is_shared]
        for number, steps in enumerate(pieces, 1):
            ends = number == len(pieces)
            part = _part(files, steps, spots, joins=joins, is_shared=is_shared, is_last=ends)
            part = replace(part, allow_nonfinite=allow_nonfinite)
            if ends and files is groups[-1] and plan.history is not None:
                part = replace(part, hashed=tuple(plan.history.hashed))
            called = ", ".join(file.name for file in files)
            if is_shared:
                called += f" ({number} of {len(pieces)})"
            size = sum(step.spec.nbytes for step in steps)
            parts.append(Part(called, size, marked_form(as_value(part, steps), roots, marks)))
    return parts, shared


def marked_form(part: Any, roots: Roots, marks: dict[Path, Mark]) -> Any:
    """Return a part as JSON, with what tells that the files that it reads are the same.

    Args:
        part: The part.
        roots: Where files lie.
        marks: Of files that other parts read too; new ones are added.
    """
    read: dict[Path, None] = {}

    def below(path: Path) -> tuple[str, str]:
        if not path.is_dir():
            read[path] = None
        return roots.below(path)

    form = as_form(part, below)
    for path in read:
        if path not in marks:
            marks[path] = mark_of(path)
    return [form, as_form({path: marks[path] for path in sorted(read)}, roots.below)]


def _written(part: ModelPart) -> Iterator[TensorSpec]:
    yield from (move.spec for move in part.moves)
    yield from (spot.spec for spot in part.all_spots.values())


def _groups(files: Sequence[OutputFile]) -> Iterator[list[OutputFile]]:
    """Yield files that are written together: parts of one coded weight may lie in several."""
    place = {step.spec.name: n for n, file in enumerate(files) for step in file.steps}
    leader = list(range(len(files)))

    def find(number: int) -> int:
        while leader[number] != number:
            number = leader[number]
        return number

    for file in files:
        for step in file.steps:
            if step.recoded is not None and step.leads:
                ends = {find(place[name]) for name in step.recoded.names.values()}
                for each in ends:
                    leader[each] = min(ends)
    together: dict[int, list[OutputFile]] = {}
    for number, file in enumerate(files):
        together.setdefault(find(number), []).append(file)
    yield from together.values()


def _pieces(files: Sequence[OutputFile]) -> Iterator[tuple[Step, ...]]:
    """Yield the steps of some files: all together, or of large ones some at a time."""
    steps = [step for file in files for step in file.steps]
    if sum(file.size for file in files) <= CUT_ABOVE:
        yield tuple(steps)
        return
    total = sum(step.spec.nbytes for step in steps)
    count = -(-total // CUT_BYTES)
    some: list[Step] = []
    done = pieces = 0
    for step in steps:
        some.append(step)
        done += step.spec.nbytes
        if done * count >= (pieces + 1) * total:  # so that all are about as large
            yield tuple(some)
            some, pieces = [], done * count // total
    if some or not steps:
        yield tuple(some)


def _part(
    files: Sequence[OutputFile],
    steps: Sequence[Step],
    spots: Mapping[str, Spot],
    *,
    joins: bool,
    is_shared: bool,
    is_last: bool,
) -> ModelPart:
    """Return some steps of some files as a part; ``spots`` says where their tensors go."""
    copied: list[tuple[Spot, StoredTensor]] = []
    computed: list[Step] = []
    for step in steps:
        stored = step.copied
        if stored is not None:
            copied.append((spots[step.spec.name], stored))
        elif step.leads and step.spec.nbytes:
            computed.append(step)
    together = {n for step in computed if step.recoded is not None for n in _names(step)}
    placed = [step.spec.name for step in computed if step.recoded is None]
    moves: list[Move] = []
    for number, file in enumerate(files):
        mine = [pair for pair in copied if pair[0].file == number]
        if file.original is not None and is_last:  # its header, which is that of the output
            size = len(file.layout.header)
            spec = TensorSpec("", BYTES, (size,))
            moves.append(Move(number, spec, file.original.path, 0, 0))
        if not joins:
            moves += [Move(number, s.spec, t.path, t.offset, s.offset) for s, t in mine]
            continue
        for each in joined_ranges(mine, joins=True):
            spec = TensorSpec("", BYTES, (each.size,))
            moves.append(Move(number, spec, each.source, each.source_offset, each.offset))
    return ModelPart(
        files=tuple(_file(file, is_shared=is_shared, is_last=is_last) for file in files),
        moves=tuple(moves),
        steps=tuple(computed),
        places={name: (spots[name].file, spots[name].offset) for name in placed},
        spots={name: spots[name] for name in sorted(together)},
        is_shared=is_shared,
    )


def _names(step: Step) -> Iterator[str]:
    yield step.spec.name
    if step.recoded is not None:
        yield from step.recoded.names.values()


def _file(file: OutputFile, *, is_shared: bool, is_last: bool) -> PartFile:
    """Return a file of a part; of several parts that write it the last writes its header, once."""
    is_sealed = is_last and file.history is not None
    is_copied = file.original is not None or file.history is not None or not is_last
    return PartFile(
        file.name,
        file.size,
        b"" if is_copied else file.layout.header,
        file.original.path if file.original is not None and not is_shared else None,
        replace(file, steps=(), original=None) if is_sealed else None,
    )


def opened_part(task: Task) -> tuple[Any, dict[Path, Stamp]]:
    """Return the part that a task is about, and what the files are here that it reads.

    Raises:
        FileFormatError: It is damaged, or a file is not the one that it was planned with.
    """
    roots = Roots(dict(task.roots))
    made = from_form(json.loads(task.text), roots.placed, f"part {task.number}")
    part, marks = made
    return part, check_marks(marks)


def write_part(task: Task) -> Mapping[str, Any]:
    """Write a part of a model; see :class:`loratool.shards.job.Work`.

    Raises:
        LoratoolError: An input changed or ended, a result is not finite, or the disk is full.
    """
    part, stamps = opened_part(task)
    assert isinstance(part, ModelPart)
    folder, outcome = task.folder, Outcome()
    with folder.writing(), folder.bench() as place:
        paths = [(folder.work if part.is_shared else place) / file.name for file in part.files]
        outcome.weights = _write(part, paths, stamps, outcome, task, task.settings.device)
        for file, path in zip(part.files, paths, strict=True):
            if file.sealed is not None:
                file.sealed.seal(outcome, path)
            sync_file(path)
            if not part.is_shared:
                folder.keep(path, file.name)
    roots = Roots(dict(task.roots))
    return {
        "files": {file.name: file.size for file in part.files},
        "bytes": sum(spec.nbytes for spec in _written(part)),
        "kept": [as_form(each, roots.below) for each in outcome.weights.parts[0]],
        "total": [as_form(each, roots.below) for each in outcome.weights.parts[1]],
        "is_empty": outcome.weights.is_empty,
        "digests": [[*roots.below(path), sha] for path, sha in outcome.digests.items()],
    }


def _write(
    part: ModelPart,
    paths: Sequence[Path],
    stamps: Mapping[Path, Stamp],
    outcome: Outcome,
    task: Task,
    device: str,
) -> RunResult:
    @exactly
    def write(*, device: str) -> RunResult:
        return write_files(
            part.works(outcome),
            paths,
            stamps,
            allow_nonfinite=part.allow_nonfinite,
            device=device,
            threads=task.settings.threads,
            progress=task.beat,
            is_shared=part.is_shared,
        )

    return write(device=device)


@dataclass(frozen=True)
class Closing:
    """What is needed once all parts of a model are there.

    Attributes:
        plan: The plan without its tensors.
        is_changed: Whether a tensor is added or replaced, whatever the deltas are.
        adapters: What the adapters are called.
        shared: Files that several parts have written.
        marks: What the files are that travel along, the adapters, and one of the base.
    """

    plan: ModelPlan
    is_changed: bool
    adapters: tuple[str, ...]
    shared: tuple[str, ...]
    marks: Mapping[Path, Mark]


def model_job(
    plan: ModelPlan,
    output: Path,
    roots: Roots,
    *,
    allow_nonfinite: bool = False,
    told: Mapping[str, Any],
) -> Job:
    """Return the writing of a model as a job.

    Args:
        plan: What is written.
        output: Where.
        roots: Where inputs lie.
        allow_nonfinite: Whether NaN and infinity are written.
        told: What people are told of it.
    """
    parts, shared = model_parts(plan, roots, joins=True, allow_nonfinite=allow_nonfinite)
    sources = [each.source for each in plan.beside() if each.source is not None]
    hashed = plan.history.hashed if plan.history is not None else []
    weights = [path for path in plan.stamps if path not in hashed]
    closing = Closing(
        plan=replace(plan, files=(), adapters=(), stamps={}, notes=(), unused=(), left_behind=()),
        is_changed=any(step.added or step.replaced for step in plan.steps()),
        adapters=tuple(called(adapter.path) for adapter in plan.adapters),
        shared=tuple(shared),
        marks={path: mark_of(path) for path in (*sources, *hashed, *weights[:1])},
    )
    form = as_form(closing, roots.below)
    return Job(
        plan.history.verb if plan.history is not None else "merge",
        output,
        tuple(parts),
        form,
        roots.named,
        write_part,
        plan.is_folder,
        told,
    )


def finish_model(
    folder: PartsFolder,
    document: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    roots: Roots,
    *,
    count: int,
    asked: Mapping[str, Any],
    force: bool,
) -> Outcome:
    """Make the output of its parts, all of which are there.

    Args:
        folder: Where they are.
        document: What ``plan.json`` holds.
        records: The records of all parts.
        roots: Where inputs lie.
        count: How many adapters are merged; of another merge parts are not finished.
        asked: What is asked of it, as it is recorded.
        force: Replace an existing output.

    Returns:
        What was found.

    Raises:
        LoratoolError: It is not to be kept, or cannot be written.
    """
    closing = from_form(document["closing"], roots.placed, folder.plan_path)
    outcome = outcome_of(records, roots)
    try:
        plan = closing.plan
        is_same = plan.history is None or dict(plan.history.options) == dict(asked)
        if not is_same or len(closing.adapters) != count:
            raise folder.of_another(document)
        check_marks(closing.marks)
        refuse_empty(closing.adapters, outcome, is_changed=closing.is_changed)
        beside = sorted((*plan.beside(), *plan.telling(outcome)), key=_is_late)
        is_sound = all(map(is_inside, (*closing.shared, *(each.name for each in beside))))
    except DAMAGED:
        is_sound = False
    if not is_sound:
        raise FileFormatError(folder.plan_path, "is damaged, or not the plan of a merge")
    with folder.writing():
        for name in closing.shared:
            if not (folder.made / name).exists():  # else it was done before
                folder.keep(folder.work / name, name)
        for sidecar in beside:
            folder.add(partial(write_sidecar, sidecar), sidecar.name)
    folder.publish(folder=plan.is_folder, force=force)
    return outcome


def _is_late(sidecar: Sidecar) -> bool:
    return is_index(sidecar.name)


def outcome_of(records: Sequence[Mapping[str, Any]], roots: Roots) -> Outcome:
    """Return what was found in all parts together, as if they had been one run.

    Raises:
        FileFormatError: A record is damaged.
    """
    try:
        sums = [
            [float(from_form(n, roots.placed, "a record")) for each in records for n in each[name]]
            for name in ("kept", "total")
        ]
        outcome = Outcome(
            weights=RunResult.of(*sums, is_empty=all(each["is_empty"] for each in records))
        )
        for each in records:
            for root, below, sha in each["digests"]:
                outcome.digests[roots.placed(root, below)] = str(sha)
    except DAMAGED as error:
        raise FileFormatError("records", f"are damaged ({type(error).__name__})") from None
    return outcome
