"""A share of the parts of a job, done by this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.display.document import Document, Lines
from loratool.display.figures import human_bytes
from loratool.display.shown import Shown
from loratool.errors import OutputError
from loratool.shards.dealing import Share, dealt, longest_first
from loratool.shards.folder import STALE, PartsFolder
from loratool.shards.job import Job, Settings, carry_out
from loratool.shards.records import missing_parts

__all__ = ["ShareReport", "do_share"]

Progress = Callable[[int, int], None]
POLL: Final = 1.0


@dataclass(frozen=True)
class ShareReport(Shown):
    """What a worker has done of a job.

    Attributes:
        verb: The command.
        output: What is made.
        folder: Where the parts come together.
        share: Which share it was.
        parts: How many parts it did, or found done.
        bytes_done: How many bytes these are.
        all_parts: How many parts there are.
        left: How many of them nobody has done yet.
        seconds: How long it took.
        notes: What a user should know.
    """

    verb: str
    output: Path
    folder: Path
    share: Share
    parts: int
    bytes_done: int
    all_parts: int
    left: int
    seconds: float
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return a document for scripts."""
        return {
            "schema": 1,
            "verb": self.verb,
            "output": str(self.output),
            "folder": str(self.folder),
            "shards": str(self.share),
            "parts": self.parts,
            "bytes": self.bytes_done,
            "all_parts": self.all_parts,
            "left": self.left,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
        }

    def document(self) -> Document:
        """Return what people see of it."""
        words = (
            f"{self.folder}: {self.parts} of {self.all_parts} parts done here, "
            f"{human_bytes(self.bytes_done)}; "
        )
        words += f"{self.left} left" if self.left else "all parts are there: finish with --finish"
        return Document((Lines((words,)),), self.notes)


def do_share(
    job: Job,
    share: Share,
    settings: Settings,
    *,
    waits: bool = False,
    progress: Progress | None = None,
) -> ShareReport:
    """Do a share of a job in this process, one part after the other.

    Args:
        job: The job, whose folder is there.
        share: Which of its parts.
        settings: How.
        waits: Whether to go on, where parts are claimed, until all are done: those of workers
            that have stopped are taken over.
        progress: Called with bytes done and bytes in all, of this share.

    Raises:
        LoratoolError: A part cannot be done; what is done stays.
    """
    folder = PartsFolder(job.output)
    begun = time.monotonic()
    sizes = job.sizes
    if share.is_auto:
        chosen = _free(job, folder, waits=waits)
        total = sum(sizes)
    else:
        mine = dealt(sizes, share)
        chosen = iter(mine)
        total = sum(sizes[index] for index in mine)
    done, made = 0, set[int]()
    for index in chosen:

        def tell(part: int, whole: int, before: int = done, size: int = sizes[index]) -> None:
            if progress is not None:
                progress(before + round(size * part / (whole or 1)), total)

        record = carry_out(job.work, job.task(index, settings), tell, alone=share.is_auto)
        if record is None:
            continue  # somebody else was quicker
        if index in made:
            raise OutputError(
                folder.path,
                f"{job.parts[index].name} was done, and is not there any more",
                hint="see what else is at work in that folder",
            )
        made.add(index)
        done += sizes[index]
    left = missing_parts(folder, job.document)
    if not folder.plan_path.exists():  # somebody has finished
        left = []
    return ShareReport(
        job.verb,
        job.output,
        folder.path,
        share,
        len(made),
        done,
        len(job.parts),
        len(left),
        time.monotonic() - begun,
    )


def _free(job: Job, folder: PartsFolder, *, waits: bool) -> Iterator[int]:
    """Yield parts that nobody is at, the longest first, until there are none.

    The growth of a claim is looked at, not its time: clocks of two machines differ.
    """
    order = longest_first(job.sizes)
    seen: dict[int, tuple[int, float]] = {}
    while folder.plan_path.exists():  # else somebody has finished
        is_any = False
        open_parts = [n for n in order if folder.record(n + 1, job.digest) is None]
        for index in open_parts:
            claim = folder.claimed(index + 1)
            if claim is not None and not claim.is_dead:
                size, since = seen.get(index, (-1, 0.0))
                if claim.size != size:
                    seen[index] = (claim.size, time.monotonic())
                    continue
                if time.monotonic() - since < STALE:
                    continue
            if claim is not None:
                folder.take_over(index + 1)
            is_any = True
            yield index
        if not open_parts or not (is_any or waits):
            return
        if not is_any:
            time.sleep(POLL)
