"""``batch``: many commands in one pool of processes, with one record each."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import IO, Any, Final

from loratool.display.document import Column, Document, Lines, Table
from loratool.display.shown import Shown
from loratool.engines.course import Call, follow
from loratool.engines.engine import Engine, What, opened
from loratool.engines.names import OPTION, PROCESSES, parse_name
from loratool.engines.workers import WorkerDiedError
from loratool.errors import (
    FileFormatError,
    LoratoolError,
    OptionError,
    OutputExistsError,
    unreadable,
)
from loratool.files.json import parse_json
from loratool.jobs.step import Asked, Commands, Done, Places, Step, command_line, step_from

__all__ = ["BatchReport", "JobRecord", "batch"]

AnyPath = str | PathLike[str]
STDIN: Final = "-"
FAILURE: Final = 2
SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class Job:
    """A command that is to be carried out.

    Attributes:
        number: Which, from 1 on: its line.
        asked: The command.
        digest: What tells it from others, wherever it stands in the list.
        abroad: The command where another folder is the working one; the same if none can be.
    """

    number: int
    asked: Asked
    digest: str
    abroad: Asked

    @property
    def is_there(self) -> bool:
        """Whether what it writes exists; where it writes nothing, that is there."""
        return self.asked.place is None or self.asked.place.exists()


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What came of a job.

    Attributes:
        job: Which.
        words: Its command line.
        digest: What tells it from others.
        done: Its status and its document, or how it failed.
        attempts: How often it was tried.
        seconds: How long the last attempt took, waiting included.
    """

    job: int
    words: tuple[str, ...]
    digest: str
    done: Done
    attempts: int = 1
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the record for scripts."""
        return {
            "schema": 1,
            "job": self.job,
            "command": list(self.words),
            "digest": self.digest,
            "status": self.done.status,
            "attempts": self.attempts,
            "seconds": round(self.seconds, 6),
            "result": self.done.document,
            "error": self.done.error,
        }


@dataclass(frozen=True)
class BatchReport(Shown):
    """What came of all jobs.

    Attributes:
        jobs: How many there are.
        done: How many went well.
        found: How many ran and found something wrong.
        skipped: How many were done before.
        failures: The records of those that failed.
        records: Where all records are; ``None`` where they are in ``results``.
        results: The records in the order of the jobs, where no file holds them.
    """

    jobs: int
    done: int = 0
    found: int = 0
    skipped: int = 0
    failures: tuple[JobRecord, ...] = ()
    records: Path | None = None
    results: tuple[JobRecord, ...] = ()

    @property
    def status(self) -> int:
        """The exit status: 2 where nothing could be done, 1 where something failed or was found."""
        if self.failures and not (self.done or self.found or self.skipped):
            return FAILURE
        return 1 if self.failures or self.found else 0

    def as_json(self) -> dict[str, Any]:
        """Return a document for scripts."""
        return {
            "schema": 1,
            "jobs": self.jobs,
            "done": self.done,
            "found": self.found,
            "failed": len(self.failures),
            "skipped": self.skipped,
            "records": str(self.records) if self.records is not None else None,
            "failures": [
                {"job": each.job, "command": list(each.words), "error": each.done.error}
                for each in self.failures
            ],
        }

    def document(self) -> Document:
        """Return what people see of it: what failed, and how much went well."""
        failed = sorted(self.failures, key=lambda record: record.job)
        rows = [
            (record.job, " ".join(record.words), _told(record.done)) for record in failed[:SHOWN]
        ]
        columns = (
            Column("job", is_kept=True),
            Column("command", folds=True, is_kept=True),
            Column("error", folds=True, is_kept=True),
        )
        counts = {
            "done": self.done,
            "found something wrong": self.found,
            "failed": len(failed),
            "done before": self.skipped,
        }
        parts = [f"{count} {words}" for words, count in counts.items() if count]
        summary = f"{self.jobs} job{'s' * (self.jobs != 1)}: {', '.join(parts) or 'nothing to do'}"
        if self.records is not None:
            summary += f"; records in {self.records}"
        more = len(failed) - len(rows)
        lines = (*((f"and {more} more that failed",) if more else ()), summary)
        return Document.of([Table.of("failed", columns, rows), Lines(lines)])


def _told(done: Done) -> str:
    error = done.error or {}
    return f"{error.get('where')}: {error.get('message')}"


def batch(
    jobs: AnyPath | Iterable[Mapping[str, Any]],
    output: AnyPath | None = None,
    *,
    workers: int | None = None,
    resume: bool = False,
    force: bool = False,
    executor: What | None = None,
    on_record: Callable[[JobRecord, int], None] | None = None,
    commands: Commands | None = None,
) -> BatchReport:
    """Carry out many commands, a few at a time, each in a process that others have used before.

    A job is ``{"command": ["inspect", "a"]}`` or ``{"verb": "truncate", "adapter": "a", "rank": 4,
    "output": "b"}``, with the names that recipes have. All are understood before the first is
    carried out. A job that fails for no reason of its own (its process dies, memory is short) is
    tried again, three times at most, while the others go on.

    Args:
        jobs: A file of JSON lines (``-`` for standard input) or the jobs themselves. Relative paths
            begin where the file lies.
        output: The file for the records, one line each; by default they are in the report.
        workers: How many processes; by default one for each processor.
        resume: Go on with the records that are in ``output``: what went well is not done again, as
            long as what it wrote is there.
        force: Begin ``output`` anew, where it exists.
        executor: What carries the jobs out instead of processes of our own: ``processes:N``,
            ``dask://HOST:PORT`` or ``mpi``, any executor, or a function that makes one, which is
            asked for another where it breaks. Elsewhere the same paths lead to the same files.
        on_record: Called with each record, and with how many there are to come in all.
        commands: What understands them; by default the command line.

    Raises:
        LoratoolError: Nothing was done; the message says why.
    """
    commands = commands or command_line()
    if workers is not None and executor is not None:
        hint = f"{OPTION} {PROCESSES}:{workers}" if executor == PROCESSES else None
        raise OptionError("--workers", f"says the same as {OPTION}: one of the two", hint=hint)
    name = parse_name(executor) if isinstance(executor, str) else None
    is_elsewhere = executor is not None and (name is None or name.kind != PROCESSES)
    count = workers or (name.count if name else None) or len(os.sched_getaffinity(0))
    place = Path(output) if output is not None else None
    if resume and place is None:
        raise OptionError("--resume", "needs the file with the records")
    found = list(_understood(jobs, commands, count, is_elsewhere=is_elsewhere))
    _check_apart(found)
    before = _read_records(place) if resume and place is not None else {}
    left = [job for job in found if before.get(job.digest) != 0 or not job.is_there]
    report = _Tally(skipped=len(found) - len(left))
    into = _Records(place, resume=resume, force=force)
    who = opened(executor or f"{PROCESSES}:{count}") if left else nullcontext()
    with who as engine, into as records:

        def take(record: JobRecord) -> None:
            records.write(record)
            report.count(record, is_kept=place is None)
            if on_record is not None:
                on_record(record, len(left))

        if engine is not None:
            _carry_out(left, commands, engine, take)
    return BatchReport(
        len(found),
        report.done,
        report.found,
        report.skipped,
        tuple(sorted(report.failures, key=lambda record: record.job)),
        place,
        tuple(sorted(report.results, key=lambda record: record.job)),
    )


@dataclass
class _Tally:
    """What has come of jobs so far."""

    done: int = 0
    found: int = 0
    skipped: int = 0
    failures: list[JobRecord] = field(default_factory=list)
    results: list[JobRecord] = field(default_factory=list)

    def count(self, record: JobRecord, *, is_kept: bool) -> None:
        """Note a record."""
        if record.done.status >= FAILURE:
            self.failures.append(record)
        elif record.done.status:
            self.found += 1
        else:
            self.done += 1
        if is_kept:
            self.results.append(record)


def _understood(
    jobs: AnyPath | Iterable[Mapping[str, Any]],
    commands: Commands,
    count: int,
    *,
    is_elsewhere: bool,
) -> Iterator[Job]:
    """Yield the jobs as commands.

    Raises:
        OptionError: One of them cannot be understood.
        FileFormatError: The file cannot be read.
    """
    places = Places()
    if isinstance(jobs, str | PathLike):
        path = Path(jobs)
        steps = _read_jobs(path)
        if str(path) != STDIN:
            places = Places(path.parent)
    else:
        steps = ((n, step_from(table, f"job {n}")) for n, table in enumerate(jobs, 1))
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    defaults = {"as_json": True, "quiet": True, "threads": threads}
    absolute = Places(places.folder.absolute())
    for number, step in steps:
        if step.digests or step.headers:
            raise OptionError(step.where, "digests are checked in recipes only")
        asked = commands.understand(step, places, defaults=defaults)
        text = json.dumps([step.verb, step.words, step.values], sort_keys=True, default=str)
        abroad = asked
        if is_elsewhere:
            abroad = commands.understand(step, absolute, defaults=defaults)
        yield Job(number, asked, hashlib.sha256(text.encode()).hexdigest(), abroad)


def _read_jobs(path: Path) -> Iterator[tuple[int, Step]]:
    """Yield the jobs of a file with their lines."""
    name = "standard input" if str(path) == STDIN else str(path)
    try:
        data = sys.stdin.buffer.read() if str(path) == STDIN else path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            where = f"{name}: line {number}"
            yield number, step_from(parse_json(line, where=where), where)


def _check_apart(jobs: Sequence[Job]) -> None:
    """Make sure that jobs may be carried out in any order.

    Raises:
        OptionError: Two write the same, or one reads what another writes.
    """
    writers: dict[str, Job] = {}
    for job in jobs:
        for path in job.asked.writes:
            other = writers.setdefault(os.path.abspath(path), job)  # noqa: PTH100 - links stay
            if other is not job:
                raise OptionError(f"jobs {other.number} and {job.number}", f"both write {path}")
    for job in jobs:
        for path in job.asked.writes:
            above = _writer_around(path.parent, writers)
            if above is not None and above is not job:
                raise OptionError(
                    f"jobs {above.number} and {job.number}",
                    f"{path} is inside of what job {above.number} writes",
                )
        for path in (path for paths in job.asked.inputs.values() for path in paths):
            writer = _writer_around(path, writers)
            if writer is not None and writer is not job:
                raise OptionError(
                    f"job {job.number}",
                    f"reads {path}, which job {writer.number} writes, and jobs have no order",
                    hint="put the two into a recipe, and run that as one job",
                )


def _writer_around(path: Path, writers: Mapping[str, Job]) -> Job | None:
    """Return the job that writes ``path``, or a folder that it is in."""
    place = Path(os.path.abspath(path))  # noqa: PTH100
    return next((writers[str(p)] for p in (place, *place.parents) if str(p) in writers), None)


def _carry_out(
    jobs: Sequence[Job], commands: Commands, engine: Engine, take: Callable[[JobRecord], None]
) -> None:
    """Carry out jobs, and hand over what comes of them as they end."""
    by_number = {job.number: job for job in jobs}

    def record(number: int, what: Any, attempt: int, seconds: float) -> None:
        job = by_number[number]
        done = what if isinstance(what, Done) else _failed(what)
        take(JobRecord(number, job.asked.words, job.digest, done, attempt, seconds))

    follow(engine, (_call(job, commands) for job in jobs), record)


def _call(job: Job, commands: Commands) -> Call:
    """Return what carries out a job; it is asked for just before it is handed out."""
    place = job.asked.place
    is_new = place is not None and not place.exists()
    args = (commands, job.asked, job.abroad, Path.cwd(), is_new)
    return Call(job.number, _attempt, args)


def _attempt(commands: Commands, asked: Asked, abroad: Asked, home: Path, is_new: bool) -> Done:
    """Carry out a job, though it may have been before and only the message of that was lost.

    Args:
        commands: What carries it out.
        asked: The command.
        abroad: The same for another working folder.
        home: The folder that the first is for.
        is_new: Whether what it writes was not there when the job was handed out.
    """
    if asked is not abroad and Path.cwd() != home:
        asked = abroad
    done = commands.attempt(asked.words)
    is_there = done.error is not None and done.error["code"] == OutputExistsError.code
    if is_there and is_new and asked.again and _is_made_by(asked.words[0], asked.place):
        return commands.attempt(asked.again)
    return done


def _is_made_by(verb: str, place: Path | None) -> bool:
    """Whether a command of this name has written an output, from what that records of itself."""
    from loratool.plan.record import read_record

    try:
        return place is not None and read_record(place).command == verb
    except LoratoolError:
        return False


def _failed(error: BaseException) -> Done:
    """Return what is recorded of a job that failed for no reason of its own."""
    if isinstance(error, LoratoolError):
        return Done(FAILURE, None, error.as_json())
    is_system = isinstance(error, WorkerDiedError | MemoryError | OSError)
    where, what = "loratool", f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, WorkerDiedError):
        what = str(error)
    elif isinstance(error, OSError) and error.strerror:
        where, what = str(error.filename or where), error.strerror
    told = {"code": "LT324" if is_system else "LT399", "where": where, "message": what}
    return Done(FAILURE, None, {**told, "hint": "run it by itself, with --debug"})


def _read_records(path: Path) -> dict[str, int]:
    """Return the last status of each job that a file records, by its digest.

    Raises:
        FileFormatError: It holds something else.
    """
    found: dict[str, int] = {}
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise unreadable(path, error) from None
    *whole, _ = data.split(b"\n")  # the last is empty, or was not written to its end
    for number, line in enumerate(whole, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found[str(record["digest"])] = int(record["status"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise FileFormatError(path, f"line {number} is no record of a batch") from None
    return found


class _Records:
    """The file that records are appended to, a line each, as soon as they are there."""

    def __init__(self, path: Path | None, *, resume: bool, force: bool) -> None:
        self.path = path
        self._resume = resume
        self._file: IO[bytes] | None = None
        if path is not None and path.exists() and not resume and not force:
            raise OutputExistsError(
                path, "exists already", hint="--resume goes on with it, --force begins it anew"
            )

    def _is_torn(self) -> bool:
        """Whether the last line was not written to its end."""
        assert self.path is not None
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if not size:
                return False
            file.seek(size - 1)
            return file.read(1) != b"\n"

    def write(self, record: JobRecord) -> None:
        """Write a record."""
        if self._file is not None:
            self._file.write(json.dumps(record.as_json(), separators=(",", ":")).encode() + b"\n")
            self._file.flush()

    def __enter__(self) -> _Records:
        if self.path is not None:
            try:
                self._file = self.path.open("ab" if self._resume else "wb")
                if self._resume and self._is_torn():
                    self._file.write(b"\n")
            except OSError as error:
                raise unreadable(self.path, error) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
