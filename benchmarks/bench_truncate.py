"""``loratool truncate`` against a dense SVD of each delta, as kohya's resize script does it."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any, Final

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
    dense, kohya, factored, quality = modules(size, arguments)
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
        Figure("dense SVD / factored, one module", dense.wall / factored.wall, "x", ">= 1,000"),
        Figure(
            "kohya-style resize / whole command, 32 layers",
            kohya.wall * count / whole,
            "x",
            ">= 50",
            f"{count} modules, projected from one",
        ),
        Figure(
            "error / optimum - 1", quality - 1, "", "<= 0.0001", "float32 factors, rank 64 to 16"
        ),
    ]
    print_report(
        f"truncate, {size} x {size}, rank {RANK_IN} to {RANK_OUT}",
        [dense, kohya, factored, *timings],
        figures,
        as_json=arguments.json,
    )
    return 0


def modules(size: int, arguments: argparse.Namespace) -> tuple[Timing, Timing, Timing, float]:
    """Time one module both ways in turn, in this process, and return the error's excess."""
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(size, RANK_IN, generator=generator)
    down = (
        torch.randn(RANK_IN, size, generator=generator) * torch.linspace(1, 0.01, RANK_IN)[:, None]
    )
    delta = up @ down
    dense = Timing("dense torch.linalg.svd, one module")
    kohya = Timing("kohya-style dense resize, one module")
    factored = Timing("factored, one module")
    for number in range(max(1, arguments.dense_runs)):
        say(f"run {number + 1} of {arguments.dense_runs}: dense SVD")
        timed(dense, lambda: torch.linalg.svd(delta, full_matrices=False))
        say(f"run {number + 1} of {arguments.dense_runs}: kohya-style")
        timed(kohya, lambda: kohya_resize(up, down))
        timed(factored, lambda: factored_resize(up, down), FACTORED_TIMES)
    cut = factored_resize(up, down)
    exact = factor(LowRank(up, down))
    optimum = float(exact.singular_values[RANK_OUT:].norm())
    error = float((up.double() @ down.double() - cut.up.double() @ cut.down.double()).norm())
    return dense, kohya, factored, error / optimum


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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as loratool does: a thread to a module
    cut = factor(LowRank(up, down)).truncated(RANK_OUT)
    torch.set_num_threads(threads)
    return LowRank(cut.up.float(), cut.down.float())


def kohya_resize(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Form the delta, decompose it with full matrices, cut: the published procedure."""
    U, S, Vh = torch.linalg.svd(up @ down)
    return U[:, :RANK_OUT] * S[:RANK_OUT], Vh[:RANK_OUT]


if __name__ == "__main__":
    sys.exit(main())
