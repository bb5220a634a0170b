"""A few pieces of work at a time, each on one thread; BLAS has no threads of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Final, TypeVar

from loratool.plan.blas import single_threaded_blas

__all__ = ["Progress", "in_parallel", "usual_threads"]

Progress = Callable[[int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_THREADS: Final = 8
SMALL: Final = 256 << 10
"""Bytes of work below which threads mostly wait for each other, for the interpreter does more of
it than the processor."""


def usual_threads(sizes: Sequence[int], most: int | None = MAX_THREADS) -> int:
    """Return how many threads suit work of these sizes in bytes.

    One for each processor, at most ``most``; but one alone where the pieces are small.
    """
    if sizes and sum(sizes) < SMALL * len(sizes):
        return 1
    processors = len(os.sched_getaffinity(0))
    return processors if most is None else min(most, processors)


def in_parallel(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    threads: int | None,
    progress: Progress | None = None,
    sizes: Sequence[int] | None = None,
) -> list[Result]:
    """Return ``work`` of every item, a few at a time, each on one thread.

    One thread for one item, so that results do not depend on how many there are.

    Args:
        work: What to do.
        items: With what.
        threads: How many at a time; by default what suits ``sizes``.
        progress: Called with how much is done and how much there is.
        sizes: How many bytes each item is about; by default all are alike.
    """
    import numpy as np  # here, for a merge begins to copy before it is loaded

    if not items:
        return []
    amounts = list(sizes) if sizes is not None else [1] * len(items)
    total = sum(amounts)
    stop = threading.Event()
    results: dict[int, Result] = {}
    done = 0

    def one(index: int) -> tuple[int, Result] | None:
        if stop.is_set():
            return None
        with np.errstate(all="ignore"):
            return index, work(items[index])

    count = threads or usual_threads(sizes or ())
    with single_threaded_blas(), ThreadPoolExecutor(count) as pool:
        try:
            waiting = iter(range(len(items)))
            running: set[Future[tuple[int, Result] | None]] = {
                pool.submit(one, index) for index in islice(waiting, count)
            }
            while running:
                finished, running = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
                for future in finished:
                    found = future.result()
                    assert found is not None
                    results[found[0]] = found[1]
                    done += amounts[found[0]]
                    running |= {pool.submit(one, index) for index in islice(waiting, 1)}
                if progress is not None:
                    progress(done, total)
        finally:
            stop.set()
    return [results[index] for index in range(len(items))]
