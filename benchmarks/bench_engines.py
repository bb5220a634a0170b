"""What an engine costs: 1,000 calls that do nothing, handed out and taken.

``python benchmarks/bench_engines.py [NAME...]``: names of ``--executor``, such as
``dask://127.0.0.1:8786``; ``mpiexec -n 3 python benchmarks/bench_engines.py mpi``.
"""

from __future__ import annotations

import operator
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

from loratool.engines.course import Call, follow
from loratool.engines.engine import What, opened

CALLS = 1000
RUNS = 3


def pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"))


def measure(what: What) -> tuple[float, float]:
    """Return the seconds until an engine has answered once, and those of the calls."""
    begun = time.perf_counter()
    taken: list[object] = []
    with opened(what) as engine:
        engine.submit(operator.index, 0).result()
        start = time.perf_counter() - begun
        best = float("inf")
        for _ in range(RUNS):
            begun = time.perf_counter()
            calls = (Call(number, operator.index, (number,)) for number in range(CALLS))
            follow(engine, calls, lambda key, result, attempt, seconds: taken.append(result))
            best = min(best, time.perf_counter() - begun)
    assert sorted(map(int, taken)) == sorted(RUNS * list(range(CALLS)))  # type: ignore[call-overload]
    return start, best


def main() -> None:
    engines: dict[str, What] = dict(zip(sys.argv[1:], sys.argv[1:], strict=True))
    if not engines:
        engines = {
            "threads": ThreadPoolExecutor,
            "a pool of processes": pool,
            "processes": "processes",
        }
    for name, what in engines.items():
        start, seconds = measure(what)
        print(f"{name:<24}start {start:6.3f} s   {CALLS} calls {seconds:6.3f} s", flush=True)


if __name__ == "__main__":
    main()
