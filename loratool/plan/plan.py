"""A plan, and what is done with one: run it against a sink, or write its files.

There are two kinds, of a model and of an adapter; here they are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from loratool.files.atomic import check_output, staged, sync_file
from loratool.files.inputs import Stamp
from loratool.files.sources import fetch
from loratool.files.targets import target_of
from loratool.plan.digests import digest_tasks
from loratool.plan.history import History
from loratool.plan.outcome import Outcome
from loratool.plan.run import FileWork, NullSink, Sink, run_files, write_files
from loratool.plan.sidecar import Sidecar, read_whole, write_sidecar
from loratool.plan.threads import Progress

__all__ = ["Plan", "run", "write", "write_at"]

SYNC_BELOW: Final = 64 << 20
"""Outputs smaller than this are always synced to the disk: it costs nothing that matters."""


class Plan(Protocol):
    """Files that will be written, decided from headers alone."""

    @property
    def stamps(self) -> Mapping[Path, Stamp]:
        """What the weights files that are read were when their headers were read."""
        ...

    @property
    def history(self) -> History | None:
        """How the output came to be, where that is recorded."""
        ...

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder, else it is the one weights file."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all weights files."""
        ...

    @property
    def peak_memory(self) -> int:
        """Bytes of memory that carrying it out takes at most, roughly."""
        ...

    def inputs(self) -> Iterator[Path]:
        """Yield every file that is read, which no output may replace."""
        ...

    def beside(self) -> Iterator[Sidecar]:
        """Yield the files that are no weights."""
        ...

    def telling(self, outcome: Outcome) -> Iterator[Sidecar]:
        """Yield the files that tell what was done, which only ``outcome`` knows."""
        ...

    def works(self, outcome: Outcome) -> list[FileWork]:
        """Return what is to be done for each weights file; what it finds goes to ``outcome``."""
        ...

    def check(self, outcome: Outcome) -> None:
        """Look at what came out, before anybody can see it.

        Raises:
            LoratoolError: It is not to be kept.
        """
        ...


def run(
    plan: Plan,
    sink: Sink | None = None,
    *,
    allow_nonfinite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Compute everything, and hand it to ``sink``; without one, only to see what comes out.

    Raises:
        LoratoolError: An input changed or ended, or a result is not finite.
    """
    _fetch(plan)
    outcome = Outcome()
    outcome.weights = run_files(
        _works(plan, outcome),
        sink or NullSink(),
        plan.stamps,
        allow_nonfinite=allow_nonfinite,
        device=device,
        threads=threads,
        progress=progress,
    )
    return outcome


def _works(plan: Plan, outcome: Outcome) -> list[FileWork]:
    """Return what is to be done, the hashes of inputs that are recorded among it."""
    works = plan.works(outcome)
    hashing = digest_tasks(plan.history, outcome)
    if hashing:
        works[-1] = replace(works[-1], tasks=[*works[-1].tasks, *hashing])
    return works


def _fetch(plan: Plan) -> None:
    """Bring to the disk what is read whole."""
    hashed = plan.history.hashed if plan.history is not None else ()
    fetch(read_whole(plan.stamps, hashed, plan.beside()))


def write(
    plan: Plan,
    output: Path,
    *,
    inputs: Sequence[Path],
    force: bool = False,
    allow_nonfinite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    sync: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Write ``plan`` at ``output``, whole or not at all.

    Args:
        plan: What to write.
        output: Where.
        inputs: What the output may not touch, beside what is read.
        force: Replace an existing output.
        allow_nonfinite: Write NaN and infinity where they come out.
        device: Where to compute.
        threads: Number of worker threads.
        sync: Wait until the weights are on the disk, not only in the system's cache.
        progress: Called with bytes done and bytes in all.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    check_output(
        output,
        force=force,
        inputs=[*inputs, *plan.inputs()],
        needed=plan.nbytes + sum(sidecar.nbytes for sidecar in plan.beside()),
        names=[sidecar.name for sidecar in (*plan.beside(), *plan.telling(Outcome()))],
        folder=plan.is_folder,
    )
    if target_of(output) is not None:
        from loratool.plan.upload import is_streamed, upload

        outcome = Outcome()
        works = _works(plan, outcome)
        if is_streamed(works):
            return upload(
                plan,
                works,
                outcome,
                output,
                force=force,
                allow_nonfinite=allow_nonfinite,
                device=device,
                threads=threads,
                progress=progress,
            )
    sync = sync or plan.nbytes < SYNC_BELOW
    with staged(output, folder=plan.is_folder, force=force, sync=sync) as place:
        return write_at(
            plan,
            place,
            allow_nonfinite=allow_nonfinite,
            device=device,
            threads=threads,
            sync=sync,
            progress=progress,
        )


def write_at(
    plan: Plan,
    place: Path,
    *,
    allow_nonfinite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    sync: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Write ``plan`` at ``place``, a folder or a file that nothing else uses.

    Raises:
        LoratoolError: An input changed or ended, or the result is not to be kept.
        OSError: Writing failed, such as for want of space.
    """
    _fetch(plan)
    for sidecar in plan.beside():
        write_sidecar(sidecar, place)
    outcome = Outcome()
    works = _works(plan, outcome)
    paths = [place / work.name if plan.is_folder else place for work in works]
    outcome.weights = write_files(
        works,
        paths,
        plan.stamps,
        allow_nonfinite=allow_nonfinite,
        device=device,
        threads=threads,
        progress=progress,
    )
    for sidecar in plan.telling(outcome):
        write_sidecar(sidecar, place)
    for path in paths if sync else ():
        sync_file(path)
    plan.check(outcome)
    return outcome
