"""Many workers on one large merge, simulated: discrete events fed with times measured here.

Parts are those that the library plans for sparse models of these sizes, cut as it cuts them; shares
are dealt by its own function, and claims are taken in its own order. A worker starts, plans, and
does one part after the other: it reads and writes at the measured rate, or at its part of what the
shared store carries. Workers die now and then; a restarted one does again what was not recorded.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from bench_shards import sparse_adapter, sparse_base
from harness import Figure, common_arguments, print_report, work_folder

from loratool.shards.dealing import Share, dealt, longest_first
from loratool.shards.folder import STALE
from loratool.shards.model import model_job
from loratool.shards.roots import Roots
from loratool.verbs.merging.planning import plan_merge

WORKERS: Final = (1, 2, 8, 32, 64, 163, 1000)
EXPERT_BYTES: Final = 3 * 4096 * 944 * 2
"""Of the three projections of an expert in the sparse models."""
MODELS: Final = {
    "163 x 4.3 GB": [4.3e9] * 163,
    "62 x 16 GB": [16e9] * 62,
    "1,000 x 1 GB": [1e9] * 1000,
    "400 x 0.3-4.7 GB": [0.3e9 + 4.4e9 * n / 399 for n in range(400)],
}
SPREAD: Final = 2.0
"""Seconds within which workers start."""
RESTART: Final = 30.0
"""Seconds until a worker that died is there again."""
HOUR: Final = 3600.0


@dataclass(frozen=True)
class Setting:
    """What a simulation is fed with.

    Attributes:
        rate: Bytes a second that a worker merges, as measured.
        start: Seconds until it has planned.
        finish: Seconds of ``--finish``.
        store: Bytes a second that all workers together get of the store; 0 for no limit.
        mortal: Whether each dies once an hour; it is back soon, on its machine.
        moves: Whether it is back on another one, where its old claim has to become stale.
        is_auto: Whether parts are claimed; else they are dealt beforehand.
    """

    rate: float
    start: float
    finish: float
    store: float = 0.0
    mortal: bool = False
    moves: bool = False
    is_auto: bool = True


@dataclass
class Course:
    """A simulated run.

    Attributes:
        seconds: Until the output is there.
        again: How many parts were begun again.
    """

    seconds: float
    again: int = 0


def simulate(sizes: Sequence[int], workers: int, setting: Setting, seed: int = 0) -> Course:
    """Return how long so many workers take.

    A store that all share is taken to be divided equally among as many as are at work at all: a
    part takes the longer of its time at the worker's rate and at that share of the store.
    """
    chance = random.Random(seed)
    rate = setting.rate
    if setting.store:
        rate = min(rate, setting.store / min(workers, len(sizes)))
    if setting.is_auto:
        queue = longest_first(sizes)[::-1]
        queues = [queue] * workers
    else:
        queues = [dealt(sizes, Share(n, workers))[::-1] for n in range(1, workers + 1)]
    returned: list[tuple[float, int]] = []  # parts of the dead: when their claims may be taken
    events = [(chance.random() * SPREAD * (workers > 1) + setting.start, n) for n in range(workers)]
    heapq.heapify(events)
    ended, again = 0.0, 0
    while events:
        now, worker = heapq.heappop(events)
        if queues[worker]:
            part = queues[worker].pop()
        elif returned:
            free, part = heapq.heappop(returned)
            now = max(now, free)
        else:
            continue
        takes = sizes[part] / rate
        dies = chance.expovariate(1 / HOUR) if setting.mortal else takes + 1
        if dies >= takes:
            ended = max(ended, now + takes)
            heapq.heappush(events, (now + takes, worker))
            continue
        again += 1
        back = now + dies + RESTART + setting.start
        if setting.is_auto and setting.moves:
            heapq.heappush(returned, (now + dies + STALE, part))
        elif setting.is_auto:
            heapq.heappush(returned, (back, part))
        else:
            queues[worker].append(part)
        heapq.heappush(events, (back, worker))
    return Course(ended + setting.finish, again)


def planned_sizes(folder: Path, sizes: Sequence[float]) -> list[int]:
    """Return the sizes of the parts that the library makes of a model with such files."""
    folder.mkdir()
    found: list[int] = []
    by_size: dict[int, list[int]] = {}
    for size in sizes:
        experts = max(1, round(size / EXPERT_BYTES))
        if experts not in by_size:  # files of one size are cut in one way
            place = folder / str(experts)
            base = sparse_base(place, 2, experts, (944, 4096))
            adapter = sparse_adapter(folder / f"{experts}-adapter", 2, 1, (944, 4096))
            output = folder / "out"
            plan = plan_merge(base, [adapter], output=output)
            roots = Roots.of({"base": base, "adapter 0": adapter})
            job = model_job(plan, output, roots, told={})
            by_size[experts] = job.sizes[: len(job.sizes) // 2]
        found += by_size[experts]
    return found


def main() -> int:
    """Run the simulation."""
    parser = common_arguments(__doc__, runs=1)
    parser.add_argument("--measured", type=Path, required=True, help="what bench_shards.py wrote")
    parser.add_argument("--store", type=float, default=100.0, help="GB/s of the store; default 100")
    arguments = parser.parse_args()
    measured = json.loads(arguments.measured.read_text())
    figures: list[Figure] = []
    with work_folder(arguments) as folder:
        for number, (name, files) in enumerate(MODELS.items()):
            sizes = planned_sizes(folder / str(number), files)
            figures += table(name, sizes, measured, arguments)
    print_report("workers, simulated", [], figures, as_json=arguments.json)
    return 0


def table(
    name: str, sizes: Sequence[int], measured: dict[str, Any], arguments: argparse.Namespace
) -> list[Figure]:
    """Return the figures of one model."""
    plain = Setting(measured["bytes_per_second"], measured["planning"], measured["finish"])
    alone = simulate(sizes, 1, plain).seconds
    found = []
    for workers in WORKERS:
        ways = {
            "dealt": replace(plain, is_auto=False),
            "store": replace(plain, store=arguments.store * 1e9),
            "deaths": replace(plain, mortal=True),
            "deaths, moved": replace(plain, mortal=True, moves=True),
            "deaths, dealt": replace(plain, mortal=True, is_auto=False),
        }
        auto = simulate(sizes, workers, plain).seconds
        others = {way: simulate(sizes, workers, setting) for way, setting in ways.items()}
        note = f"{auto:.0f} s; " + ", ".join(f"{way} {o.seconds:.0f}" for way, o in others.items())
        note += f" ({others['deaths'].again} again)"
        target = "at least 0.8" if 1 < workers <= 32 else ""
        found.append(
            Figure(
                f"{name}, {len(sizes)} parts, {workers:,} workers",
                alone / auto / workers,
                "",
                target,
                note,
            )
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
