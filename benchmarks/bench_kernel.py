"""Where the time of a merge goes: its stages on one 2048 x 5632 bfloat16 weight with r = 16.

One thread takes the weight apart into the blocks that a merge takes it apart into, and each stage
works on what the one before it has left in the cache. Look here before changing a kernel.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from harness import (
    ALL_LINEAR,
    TINY_LLAMA,
    common_arguments,
    machine,
    make_adapter,
    make_base,
    module_name,
    read_through,
    say,
    work_folder,
)
from rich.console import Console
from rich.table import Table

from loratool.files.inputs import InputFiles
from loratool.files.transfer import write_all
from loratool.plan.blas import single_threaded_blas
from loratool.plan.block import compute_block
from loratool.plan.host import HostBench
from loratool.plan.kernels import Kernel, compile_step
from loratool.plan.model import ModelPlan, Step
from loratool.plan.plan import write_at
from loratool.verbs.merge import plan_merge

READ: Final = "pread"
WIDEN: Final = "bf16 -> f32"
ADD: Final = "product and add"
NARROW: Final = "f32 -> bf16, finite?"
WRITE: Final = "pwrite"
BLOCK: Final = "compute_block"
MEASURED: Final = "compute_block, measuring"
RETENTION: Final = "retention (where measured)"
THREADS: Final = (1, 2)


def main() -> int:
    """Run the benchmark."""
    arguments = common_arguments(__doc__, runs=20).parse_args()
    shape = replace(TINY_LLAMA, layers=1, vocabulary=64).scaled(arguments.scale)
    with work_folder(arguments) as folder:
        base = make_base(folder / "base", shape)
        adapter = make_adapter(folder / "adapter", shape, ALL_LINEAR)
        read_through(base)
        plan = plan_merge(base, [adapter])
        rows = list(measure_stages(plan, folder, arguments.runs))
        rows += measure_runs(plan, folder, arguments.runs)
    height, width = shape.linear("down_proj")
    title = f"one {height} x {width} weight: medians of {arguments.runs} passes"
    if arguments.json:
        print(json.dumps(document(title, rows), indent=2))
    else:
        print_rows(title, rows)
    return 0


@dataclass(frozen=True)
class Row:
    """What one stage took.

    Attributes:
        name: Of the stage.
        elements: That it handled in one pass.
        seconds: Of each pass.
    """

    name: str
    elements: int
    seconds: Sequence[float]

    @property
    def median(self) -> float:
        """Seconds of a pass."""
        return statistics.median(self.seconds)

    @property
    def nanoseconds(self) -> float:
        """For each element."""
        return 1e9 * self.median / self.elements

    @property
    def megabytes(self) -> float:
        """Each second, of bfloat16."""
        return 2 * self.elements / self.median / 1e6


# ---------------------------------------------------------------------------------------- stages


@dataclass
class Clock:
    """Adds up the laps of each stage over the blocks of a pass."""

    passes: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _last: float = 0.0

    def start(self) -> None:
        """Begin a lap."""
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a lap, which belongs to the stage ``name``, and begin the next."""
        now = time.perf_counter()
        self._sums[name] += now - self._last
        self._last = time.perf_counter()

    def end_pass(self) -> None:
        """Keep the sums and begin anew."""
        for name, seconds in self._sums.items():
            self.passes[name].append(seconds)
        self._sums.clear()


@dataclass
class Subject:
    """The weight that is worked on.

    Attributes:
        step: What the plan does to it.
        kernel: The arithmetic.
        bench: The memory and the arithmetic of a worker thread.
    """

    step: Step
    kernel: Kernel
    bench: HostBench = field(default_factory=HostBench)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield first row and number of rows of each block."""
        for start in range(0, self.kernel.rows, self.kernel.block_rows):
            yield start, min(self.kernel.block_rows, self.kernel.rows - start)

    def read(self, start: int, rows: int) -> memoryview:
        """Read a block as a worker does."""
        reader = self.kernel.reader
        return reader.read(start, rows, self.bench.input(rows * reader.row_bytes))

    def offset(self, start: int) -> int:
        """Where a row begins in the output."""
        return start * self.kernel.reader.row_bytes


def find_subject(plan: ModelPlan, files: InputFiles) -> Subject:
    """Return the down projection of the first layer."""
    name = module_name(0, "down_proj") + ".weight"
    step = next(step for step in plan.steps() if step.spec.name == name)
    bench = HostBench()
    kernel = compile_step(step, files, "cpu", bench.products)
    assert len(kernel.deltas) == 1
    return Subject(step, kernel, bench)


def measure_stages(plan: ModelPlan, folder: Path, runs: int) -> Iterator[Row]:
    """Yield a row for each stage, measured in one thread."""
    files = InputFiles({})
    with single_threaded_blas(), np.errstate(all="ignore"):
        subject = find_subject(plan, files)
        clock = Clock()
        for number in range(runs + 1):
            if number == 1:
                clock = Clock()  # The first pass is for the caches.
            say(f"pass {number} of {runs}")
            stages(subject, clock, folder / "stages")
            whole_blocks(subject, clock)
            clock.end_pass()
    files.close()
    pairs = zip(clock.passes[MEASURED], clock.passes[BLOCK], strict=True)
    clock.passes[RETENTION] = [measured - plain for measured, plain in pairs]
    for name in (READ, WIDEN, ADD, NARROW, RETENTION, WRITE, BLOCK):
        yield Row(name, subject.step.spec.elements, clock.passes[name])


def stages(subject: Subject, clock: Clock, path: Path) -> None:
    """Take the weight through all stages, one by one, into a new file."""
    kernel = subject.kernel
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.ftruncate(descriptor, subject.offset(kernel.rows))
        for start, rows in subject.blocks():
            clock.start()
            source = subject.read(start, rows)
            clock.lap(READ)
            block = subject.bench.load(source, kernel.reader.dtype, (rows, kernel.width))
            clock.lap(WIDEN)
            kernel.deltas[0].apply(block, block, start, subject.bench.products)
            clock.lap(ADD)
            data, _ = subject.bench.store(block, kernel.output)
            clock.lap(NARROW)
            write_all(descriptor, data, subject.offset(start))
            clock.lap(WRITE)
    finally:
        os.close(descriptor)
        path.unlink()
        os.sync()


def whole_blocks(subject: Subject, clock: Clock) -> None:
    """Compute blocks as a worker does, without and with the measurement of what rounding kept."""
    for name, measure in ((BLOCK, False), (MEASURED, True)):
        for start, rows in subject.blocks():
            clock.start()
            compute_block(
                subject.kernel,
                subject.step,
                start,
                rows,
                subject.bench,
                measure=measure,
                allow_nonfinite=False,
            )
            clock.lap(name)


# ------------------------------------------------------------------------------------ whole runs


def measure_runs(plan: ModelPlan, folder: Path, runs: int) -> list[Row]:
    """Carry out the plan for the whole layer, with one thread and with two, in turn."""
    elements = sum(step.spec.elements for step in plan.steps())
    seconds: dict[int, list[float]] = {threads: [] for threads in THREADS}
    for _ in range(runs):
        for threads in THREADS:
            place = folder / "output"
            place.mkdir()
            begin = time.perf_counter()
            write_at(plan, place, threads=threads)
            seconds[threads].append(time.perf_counter() - begin)
            shutil.rmtree(place)
            os.sync()
    return [Row(f"a layer, threads: {n}", elements, seconds[n]) for n in THREADS]


# ------------------------------------------------------------------------------------- reporting


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """Print the table."""
    table = Table(title=title)
    table.add_column("stage")
    for name in ("ms", "min ms", "MB/s", "ns/element"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{1e3 * row.median:.2f}",
            f"{1e3 * min(row.seconds):.2f}",
            f"{row.megabytes:.0f}",
            f"{row.nanoseconds:.3f}",
        )
    Console().print(table)


def document(title: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the same for JSON."""
    return {
        "schema": 1,
        "benchmark": title,
        "machine": machine(),
        "rows": [
            {
                "name": row.name,
                "median": row.median,
                "min": min(row.seconds),
                "megabytes_per_second": row.megabytes,
                "nanoseconds_per_element": row.nanoseconds,
                "elements": row.elements,
            }
            for row in rows
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
