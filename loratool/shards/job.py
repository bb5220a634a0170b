"""A job, its parts, and how one part is done: at any time, by anybody, any number of times."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import loratool
from loratool.errors import LoratoolError
from loratool.plan.blas import blas_in_use
from loratool.shards.folder import PLAN_VERSION, Claim, PartsFolder
from loratool.shards.forms import form_text

__all__ = ["Job", "Part", "Settings", "Task", "Work", "carry_out"]


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a job that no other part depends on.

    Attributes:
        name: What it is about, for people.
        size: Bytes that it writes or reads, roughly: how long it takes.
        form: What is done, as JSON; see :mod:`loratool.shards.forms`.
    """

    name: str
    size: int
    form: Any


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides how a part is done, and not what comes out.

    Attributes:
        device: As on the command line.
        threads: Number of threads.
    """

    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class Task:
    """A part as it is handed to whoever does it, maybe on another machine.

    Attributes:
        number: Which part, from 1 on.
        name: What it is about.
        text: What is done, as JSON.
        digest: Of the plan that it is a part of.
        output: The output beside which parts come together.
        roots: Where files lie, by the names that the plan has for it.
        settings: How it is done.
        beat: Called with how many bytes are done, and of how many.
    """

    number: int
    name: str
    text: str
    digest: str
    output: Path
    roots: Mapping[str, str]
    settings: Settings = field(default_factory=Settings)
    beat: Callable[[int, int], None] | None = field(default=None, compare=False)

    @property
    def folder(self) -> PartsFolder:
        """Where the parts come together."""
        return PartsFolder(self.output)


class Work(Protocol):
    """What does a part of one kind of job: a function that other processes can import."""

    def __call__(self, task: Task) -> Mapping[str, Any]:
        """Do it, and return what its record says; ``"files"`` with their sizes among it.

        Raises:
            LoratoolError: It cannot be done, whoever tries.
        """
        ...


@dataclass(frozen=True)
class Job:
    """Something that is made in parts.

    Attributes:
        verb: The command.
        output: What is made; for what only reads, what is read.
        parts: The parts, numbered from 1 on.
        closing: What is needed in the end, as JSON.
        roots: Where files lie, by the names that the forms have for it.
        work: What does a part.
        is_folder: Whether the output is a folder.
        told: What people are told of it; part of no digest.
    """

    verb: str
    output: Path
    parts: tuple[Part, ...]
    closing: Any
    roots: Mapping[str, str]
    work: Work
    is_folder: bool = True
    told: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """What all who work on it have to agree on: version, what is done, with which files."""
        digest = hashlib.sha256(f"{PLAN_VERSION} {loratool.__version__} {self.verb}".encode())
        for part in self.parts:
            digest.update(form_text([part.name, part.form]).encode())
        digest.update(form_text(self.closing).encode())
        return digest.hexdigest()

    @property
    def sizes(self) -> list[int]:
        """How long the parts take, in bytes."""
        return [part.size for part in self.parts]

    @property
    def document(self) -> dict[str, Any]:
        """What ``plan.json`` holds."""
        return {
            "plan": PLAN_VERSION,
            "loratool": loratool.__version__,
            "verb": self.verb,
            "digest": self.digest,
            "folder": self.is_folder,
            "begun": time.time(),
            "parts": [[part.name, part.size] for part in self.parts],
            "closing": self.closing,
            "told": self.told,
        }

    def task(self, index: int, settings: Settings) -> Task:
        """Return a part as it is handed over."""
        part = self.parts[index]
        return Task(
            index + 1,
            part.name,
            form_text(part.form),
            self.digest,
            Path(os.path.abspath(self.output)),  # noqa: PTH100
            self.roots,
            settings,
        )


def carry_out(
    work: Work,
    task: Task,
    beat: Callable[[int, int], None] | None = None,
    *,
    alone: bool = False,
) -> dict[str, Any] | None:
    """Do a part, unless it is done, and return its record.

    Args:
        work: What does it.
        task: The part.
        beat: Called with how many bytes are done, and of how many.
        alone: Whether to leave it to somebody else who is at it; then there is no record, as
            where somebody else has finished all of it meanwhile.

    Raises:
        LoratoolError: It cannot be done; the folder tells why.
    """
    folder = task.folder
    known = folder.record(task.number, task.digest)
    if known is not None:
        return known
    with folder.writing():
        claim = _claimed(folder, task.number)
    if claim is None and (alone or not folder.plan_path.exists()):
        return None

    def tell(done: int, total: int) -> None:
        if claim is not None:
            claim.beat(done, total)
        if beat is not None:
            beat(done, total)

    begun, started = time.monotonic(), time.time()
    try:
        found = work(replace(task, beat=tell))
        record = {
            "plan": task.digest,
            "part": task.number,
            "name": task.name,
            **found,
            "begun": started,
            "seconds": round(time.monotonic() - begun, 3),
            **_worker(task.settings.device),
        }
        with folder.writing():
            folder.write_record(task.number, record)
        return record
    except LoratoolError as error:
        if not folder.plan_path.exists():
            return None
        failure = {"error": error.as_json(), "part": task.number, "name": task.name}
        folder.write_failure(task.number, {**failure, "host": socket.gethostname()})
        raise
    finally:
        if claim is not None:
            folder.release(claim)


def _claimed(folder: PartsFolder, number: int) -> Claim | None:
    """Claim a part, that of a worker that has died, too."""
    other = folder.claimed(number)
    if other is not None and other.is_dead:
        folder.take_over(number)
    return folder.claim(number)


def _worker(device: str) -> dict[str, Any]:
    """Return who did a part, and with what: sums of other libraries differ in the last bits."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": "cpu" if device == "auto" else device,
        "processor": platform.machine(),
        **blas_in_use(),
    }
