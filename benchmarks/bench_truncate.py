"""``loratool truncate`` against kohya's resize script: a randomised SVD of each dense delta.

Until 2025 that script decomposed the delta with full matrices; both procedures are measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from harness import (
    Command,
    Figure,
    LlamaShape,
    Timing,
    common_arguments,
    loratool_command,
    make_adapter,
    measure,
    print_report,
    say,
    work_folder,
)

from loratool.math.factored import factor
from loratool.math.lowrank import LowRank
from loratool.plan.blas import single_threaded_blas

PROJECTIONS: Final = ("q_proj", "o_proj")
RANK_IN: Final = 64
RANK_OUT: Final = 16
FACTORED_TIMES: Final = 20
"""The fast side is repeated this often in each round: it takes milliseconds."""


def main() -> int:
    """Run the benchmark."""
    parser = common_arguments(__doc__, runs=3)
    parser.add_argument("--dense-runs", type=int, default=2, help="of the dense SVD; default 2")
    arguments = parser.parse_args()
    size = max(64, round(4096 * arguments.scale))
    found = modules(size, arguments)
    shape = LlamaShape(layers=32, hidden=size, intermediate=64, kv=64, vocabulary=64)
    with work_folder(arguments) as folder:
        adapter = make_adapter(folder / "adapter", shape, PROJECTIONS, rank=RANK_IN)
        output = folder / "out"
        command = [*loratool_command(), "truncate", adapter, "--rank", str(RANK_OUT), "-o", output]
        timings = measure(
            [Command("loratool truncate, 32 layers", command, output)], arguments.runs
        )
    count = 32 * len(PROJECTIONS)
    whole = timings[0].wall
    figures = [
        Figure(
            "dense SVD / factored, one module",
            found.dense.wall / found.factored.wall,
            "x",
            ">= 1,000",
        ),
        Figure(
            "kohya's resize since 2025 / factored, one module",
            found.lowrank.wall / found.factored.wall,
            "x",
            ">= 5",
        ),
        Figure(
            "kohya's resize since 2025 / whole command, 32 layers",
            found.lowrank.wall * count / whole,
            "x",
            "",
            f"{count} modules, projected from one; before 2025 "
            f"{found.kohya.wall * count / whole:.0f} x",
        ),
        Figure(
            "error / optimum - 1",
            found.excess - 1,
            "",
            "<= 0.0001",
            "float32 factors, rank 64 to 16",
        ),
        Figure("the same of kohya's resize since 2025", found.lowrank_excess - 1),
    ]
    print_report(
        f"truncate, {size} x {size}, rank {RANK_IN} to {RANK_OUT}",
        [found.dense, found.kohya, found.lowrank, found.factored, *timings],
        figures,
        as_json=arguments.json,
    )
    return 0


@dataclass(frozen=True)
class Modules:
    """What one module takes, and the errors over the optimum of the factored and of kohya's way."""

    dense: Timing
    kohya: Timing
    lowrank: Timing
    factored: Timing
    excess: float
    lowrank_excess: float


def modules(size: int, arguments: argparse.Namespace) -> Modules:
    """Time one module in all ways in turn, in this process."""
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(size, RANK_IN, generator=generator)
    down = (
        torch.randn(RANK_IN, size, generator=generator) * torch.linspace(1, 0.01, RANK_IN)[:, None]
    )
    delta = up @ down
    dense = Timing("dense torch.linalg.svd, one module")
    kohya = Timing("kohya's resize before 2025, one module")
    lowrank = Timing("kohya's resize since 2025 (svd_lowrank), one module")
    factored = Timing("factored, one module")
    for number in range(max(1, arguments.dense_runs)):
        say(f"run {number + 1} of {arguments.dense_runs}: dense SVD")
        timed(dense, lambda: torch.linalg.svd(delta, full_matrices=False))
        say(f"run {number + 1} of {arguments.dense_runs}: kohya-style")
        timed(kohya, lambda: kohya_resize(up, down))
        timed(lowrank, lambda: kohya_lowrank(up, down), FACTORED_TIMES // 4)
        timed(factored, lambda: factored_resize(up, down), FACTORED_TIMES)
    exact = factor(LowRank(up.numpy(), down.numpy()))
    optimum = float(np.linalg.norm(exact.singular_values[RANK_OUT:]))
    cut = factored_resize(up, down)
    truth = up.double() @ down.double()
    left, right = kohya_lowrank(up, down)
    excess = [
        float((truth - torch.as_tensor(b).double() @ torch.as_tensor(a).double()).norm()) / optimum
        for b, a in ((cut.up, cut.down), (left, right))
    ]
    return Modules(dense, kohya, lowrank, factored, *excess)


def timed(timing: Timing, work: Any, times: int = 1) -> None:
    """Note what one call takes, the mean of ``times``."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    timing.walls.append((time.perf_counter() - wall) / times)
    timing.cpus.append((time.process_time() - cpu) / times)
    timing.peaks.append(0)


def factored_resize(up: torch.Tensor, down: torch.Tensor) -> LowRank:
    """Do what loratool does for one module."""
    with single_threaded_blas():  # as loratool does: a thread to a module
        cut = factor(LowRank(up.numpy(), down.numpy())).truncated(RANK_OUT)
    return LowRank(cut.up.astype("f4"), cut.down.astype("f4"))


def kohya_lowrank(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What that script does since its rewrite of 2025: a randomised decomposition of the delta."""
    U, S, V = torch.svd_lowrank(up @ down, q=RANK_OUT, niter=2)
    return U[:, :RANK_OUT] * S[:RANK_OUT], V[:, :RANK_OUT].T


def kohya_resize(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Form the delta, decompose it with full matrices, cut: the published procedure."""
    U, S, Vh = torch.linalg.svd(up @ down)
    return U[:, :RANK_OUT] * S[:RANK_OUT], Vh[:RANK_OUT]


if __name__ == "__main__":
    sys.exit(main())
