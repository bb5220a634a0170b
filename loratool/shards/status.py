"""How far an output is whose parts several workers make."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

from loratool.display.document import Column, Document, Lines, Table
from loratool.display.figures import counted, human_bytes
from loratool.display.shown import Shown
from loratool.errors import FileFormatError, MissingFileError
from loratool.shards.folder import SUFFIX, PartsFolder

__all__ = ["StatusReport", "status"]

DONE: Final = "done"
RUNNING: Final = "running"
STOPPED: Final = "stopped"
FAILED: Final = "failed"
WAITING: Final = "waiting"


@dataclass(frozen=True, slots=True)
class PartStatus:
    """How far a part is.

    Attributes:
        number: Which, from 1 on.
        name: What it is about.
        size: How many bytes it is.
        state: ``done``, ``running``, ``stopped`` (its worker has died), ``failed`` or ``waiting``.
        bytes_done: How many bytes are done.
        host: Where it is or was worked on.
        seconds: How long it took.
        error: Why it failed, as errors are told.
    """

    number: int
    name: str
    size: int
    state: str
    bytes_done: int = 0
    host: str | None = None
    seconds: float | None = None
    error: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it for scripts."""
        return {
            "part": self.number,
            "name": self.name,
            "bytes": self.size,
            "state": self.state,
            "bytes_done": self.bytes_done,
            "host": self.host,
            "seconds": self.seconds,
            "error": self.error,
        }


@dataclass(frozen=True)
class StatusReport(Shown):
    """How far an output is.

    Attributes:
        output: The output.
        folder: Where its parts come together; ``None`` where it is finished.
        verb: The command that makes it.
        version: The version of loratool that began it.
        parts: Its parts.
        rate: Bytes a second, since it was begun; ``None`` where nothing is done.
    """

    output: Path
    folder: Path | None
    verb: str | None = None
    version: str | None = None
    parts: tuple[PartStatus, ...] = ()
    rate: float | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the output is there, and no parts of it any more."""
        return self.folder is None

    def count(self, state: str) -> int:
        """Return how many parts are in a state."""
        return sum(part.state == state for part in self.parts)

    @property
    def size(self) -> int:
        """How many bytes all parts are."""
        return sum(part.size for part in self.parts)

    @property
    def bytes_done(self) -> int:
        """How many of them are done."""
        return sum(part.bytes_done for part in self.parts)

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at the rate until now."""
        return (self.size - self.bytes_done) / self.rate if self.rate else None

    def as_json(self) -> dict[str, Any]:
        """Return a document for scripts."""
        states = (DONE, RUNNING, STOPPED, FAILED, WAITING)
        return {
            "schema": 1,
            "output": str(self.output),
            "finished": self.is_finished,
            "folder": str(self.folder) if self.folder is not None else None,
            "verb": self.verb,
            "version": self.version,
            **{state: self.count(state) for state in states},
            "all_parts": len(self.parts),
            "bytes_done": self.bytes_done,
            "bytes": self.size,
            "bytes_per_second": self.rate,
            "seconds_left": self.seconds_left,
            "parts": [part.as_json() for part in self.parts],
        }

    def document(self) -> Document:
        """Return what people see of it: what is not simply done or waiting, and sums."""
        if self.is_finished:
            return Document((Lines((f"{self.output}: there, and no parts of it are left",)),))
        rows = [
            (part.name, _told(part), f"{part.bytes_done / (part.size or 1):.0%}", part.host or "")
            for part in self.parts
            if part.state not in (DONE, WAITING)
        ]
        columns = (
            Column("part", folds=True, is_kept=True),
            Column("state", folds=True, is_kept=True),
            Column("done", is_kept=True),
            Column("host", is_kept=True),
        )
        words = [
            f"{count} {state}"
            for state in (DONE, RUNNING, STOPPED, FAILED, WAITING)
            if (count := self.count(state))
        ]
        lines = [
            f"{self.output}: {self.verb}, {counted(len(self.parts), 'part')}: {', '.join(words)}",
            f"{human_bytes(self.bytes_done)} of {human_bytes(self.size)}",
        ]
        if self.rate and self.bytes_done < self.size:
            lines[1] += f", {human_bytes(round(self.rate))}/s, {_time(self.seconds_left or 0)} left"
        if self.count(DONE) == len(self.parts):
            what = "tells what was found" if self.verb == "verify" else "makes the output"
            lines.append(f"all parts are there: the same command with --finish {what}")
        elif self.count(STOPPED) or self.count(FAILED):
            lines.append("the same command with --shards auto does what is not done")
        return Document.of([Table.of("", columns, rows), Lines(tuple(lines))])


def _told(part: PartStatus) -> str:
    if part.error is None:
        return part.state
    return f"{part.state}: {part.error.get('where')}: {part.error.get('message')}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{max(1, rest)} s"


def status(path: str | PathLike[str]) -> StatusReport:
    """Say how far an output is that is made in parts.

    Args:
        path: The output of ``merge`` or ``extract``, or the model that ``verify`` checks; what
            is looked at is the folder ``OUT.loratool-parts``, which may be named itself, too.

    Raises:
        MissingFileError: Neither is there.
        FileFormatError: The folder is damaged.
    """
    output = Path(path)
    if output.name.endswith(SUFFIX) and output.name != SUFFIX:
        output = output.with_name(output.name.removesuffix(SUFFIX))
    folder = PartsFolder(output)
    if not folder.plan_path.exists():
        if output.exists():
            return StatusReport(output, None)
        raise MissingFileError(
            output, "is not there, nor are parts of it", hint="name what -o named"
        )
    document = folder.plan()
    try:
        parts = tuple(
            _status(folder, number, str(name), int(size), document["digest"])
            for number, (name, size) in enumerate(document["parts"], 1)
        )
        begun, verb, version = float(document["begun"]), document["verb"], document["loratool"]
    except (KeyError, TypeError, ValueError):
        raise FileFormatError(folder.plan_path, "is damaged") from None
    done = sum(part.bytes_done for part in parts)
    elapsed = time.time() - begun
    rate = done / elapsed if done and elapsed > 0 else None
    return StatusReport(output, folder.path, str(verb), str(version), parts, rate)


def _status(folder: PartsFolder, number: int, name: str, size: int, digest: str) -> PartStatus:
    record = folder.record(number, digest)
    if record is not None:
        host, seconds = record.get("host"), record.get("seconds")
        return PartStatus(number, name, size, DONE, size, host, seconds)
    claim = folder.claimed(number)
    failure = folder.failure(number)
    if claim is not None:
        state = STOPPED if claim.is_dead else RUNNING
        return PartStatus(number, name, size, state, min(size, claim.done), claim.host)
    if failure is not None:
        error = failure.get("error")
        host = failure.get("host")
        return PartStatus(number, name, size, FAILED, 0, host, None, error)
    return PartStatus(number, name, size, WAITING)
