"""What ``loratool batch`` costs over the work itself: many inspections, and many truncations."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Final

from harness import (
    ATTENTION,
    PYTHON,
    Command,
    Figure,
    LlamaShape,
    Timing,
    common_arguments,
    loratool_command,
    make_adapter,
    measure,
    print_report,
    work_folder,
)

LAYERS: Final = 16
"""Of four projections each: 64 modules."""
INSPECTIONS: Final = """
import gc, json, sys, loratool
gc.set_threshold(100_000)
for path in json.load(open(sys.argv[1])):
    json.dumps(loratool.inspect(path, threads=1).as_json())
"""
TRUNCATIONS: Final = """
import gc, json, os, sys, loratool
gc.set_threshold(100_000)
os.makedirs(sys.argv[2])
for number, path in enumerate(json.load(open(sys.argv[1]))):
    report = loratool.truncate(path, f"{sys.argv[2]}/{number}", rank=4, threads=1)
    json.dumps(report.as_json())
"""
"""The work itself: the functions, one after the other in one process, and their documents."""


def main() -> int:
    """Run the benchmark."""
    parser = common_arguments(__doc__, runs=3)
    arguments = parser.parse_args()
    inspections = max(2, round(1000 * arguments.scale))
    truncations = max(2, round(200 * arguments.scale))
    with work_folder(arguments) as folder:
        shape = LlamaShape(layers=LAYERS, hidden=256, intermediate=64, kv=64, vocabulary=64)
        paths = [
            make_adapter(folder / f"adapter-{number}", shape, ATTENTION, seed=number, rank=8)
            for number in range(20)
        ]
        commands = rows(folder, paths, inspections, truncations)
        timings = measure(commands, arguments.runs)
    title = f"batch, {inspections} inspections and {truncations} truncations of 64 modules"
    print_report(title, timings, figures(timings), as_json=arguments.json)
    return 0


def rows(folder: Path, paths: list[Path], inspections: int, truncations: int) -> list[Command]:
    """Return the rows: the work in one process, and batches of it with one worker and more."""
    many = len(os.sched_getaffinity(0))
    found = []
    for name, count, script in (
        ("inspections", inspections, INSPECTIONS),
        ("truncations", truncations, TRUNCATIONS),
    ):
        inputs = [str(paths[number % len(paths)]) for number in range(count)]
        listed = folder / f"{name}.json"
        listed.write_text(json.dumps(inputs))
        output = folder / f"{name}-out"
        jobs = folder / f"{name}.jsonl"
        jobs.write_text(
            "".join(f"{_job(name, n, path, output)}\n" for n, path in enumerate(inputs))
        )
        found.append(
            Command(f"{name}, the work", [PYTHON, "-c", script, listed, output], output=output)
        )
        for workers in dict.fromkeys((1, many)):
            words = [*loratool_command(), "batch", jobs, "--force", "--workers", str(workers)]
            found.append(Command(f"{name}, {workers} workers", words, output=output))
    return found


def _job(name: str, number: int, path: str, output: Path) -> str:
    if name == "inspections":
        return json.dumps({"command": ["inspect", path]})
    job = {"verb": "truncate", "adapter": path, "rank": 4, "output": f"{output}-{number}"}
    return json.dumps({**job, "force": True})


def figures(timings: list[Timing]) -> list[Figure]:
    """Return how much longer than the work a batch of it takes."""
    found: list[Figure] = []
    for timing in timings:
        name, _, rest = timing.name.partition(", ")
        if rest == "the work":
            work = timing
            continue
        found.append(
            Figure(f"{timing.name} / the work", timing.wall / work.wall, "", "at most 1.3")
        )
        found.append(Figure(f"{name}, {rest}, processor time", timing.cpu / work.cpu, ""))
    return found


if __name__ == "__main__":
    sys.exit(main())
