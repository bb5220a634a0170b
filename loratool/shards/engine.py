"""All parts of a job, done by an engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from loratool.engines.course import Call, Found, follow
from loratool.engines.engine import opened
from loratool.engines.names import PROCESSES, parse_name
from loratool.errors import EngineError, LoratoolError
from loratool.shards.dealing import longest_first
from loratool.shards.division import Executors
from loratool.shards.folder import PartsFolder
from loratool.shards.job import Job, Settings, carry_out

__all__ = ["do_all"]


def do_all(
    job: Job,
    executor: Executors | None,
    settings: Settings,
    begin: Callable[[], bool],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Have all parts of a job done, in any order, some of them more than once.

    That a part is done its record says, whatever became of the message: records are looked at
    while calls are out.

    Args:
        job: The job.
        executor: What does them.
        settings: How.
        begin: Makes its folder, and says whether there is anything to do. It is called once there
            is an engine: one that cannot be reached leaves no folder behind.
        progress: Called with bytes done and bytes in all.

    Raises:
        LoratoolError: A part cannot be done; what is done stays.
        EngineError: Parts got lost again and again.
    """
    folder = PartsFolder(job.output)
    if settings.threads is None:
        settings = replace(settings, threads=_threads(executor))
    sizes = job.sizes
    running: dict[int, int] = {}
    done: set[int] = set()

    def tell() -> None:
        if progress is not None:
            finished = sum(sizes[index] for index in done)
            at_work = sum(min(sizes[n], size) for n, size in running.items() if n not in done)
            progress(finished + at_work, sum(sizes))

    def look(index: int) -> Any:
        record = folder.record(index + 1, job.digest)
        if record is not None:
            return Found(record)
        claim = folder.claimed(index + 1)
        if claim is None:
            return None
        running[index] = claim.done
        tell()
        return claim.host, claim.pid, claim.size

    def take(index: int, result: Any, attempt: int, seconds: float) -> None:
        if isinstance(result, LoratoolError):
            raise result
        if isinstance(result, BaseException):
            raise EngineError(
                job.parts[index].name,
                f"was tried {attempt} times, and lost: {type(result).__name__}: {result}",
                hint="what is done stays: the same command goes on with the rest",
            ) from result
        done.add(index)
        tell()

    calls = (
        Call(index, carry_out, (job.work, job.task(index, settings)))
        for index in longest_first(sizes)
    )
    with opened(executor) as engine:
        if begin():
            follow(engine, calls, take, look)


def _threads(executor: Executors | None) -> int:
    """Return how many threads a part takes: those of this machine divided among our processes.

    Other engines have a worker for each processor, as a rule; where they have one for each machine,
    ``--threads`` says so.
    """
    name = parse_name(executor) if isinstance(executor, str) else None
    if name is None or name.kind != PROCESSES:
        return 1
    processors = len(os.sched_getaffinity(0))
    return max(1, processors // (name.count or processors))
