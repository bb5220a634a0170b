"""``loratool extract`` against one dense SVD for each weight, and against mergekit itself.

mergekit-extract-lora comes from its own environment (``--mergekit PROGRAM``): both then work on
the same pair of models, as whole processes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from harness import (
    ALL_LINEAR,
    PLACES,
    TINY_LLAMA,
    WIDTHS,
    Command,
    Figure,
    LlamaShape,
    Timing,
    common_arguments,
    loratool_command,
    make_adapter,
    make_base,
    measure,
    print_report,
    read_through,
    say,
    sizes_of,
    work_folder,
)
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file

import loratool
from loratool.math.extraction import leading_part

RANK: Final = 16
SHAPES: Final = ((2048, 5632), (4096, 4096))
KINDS: Final = ("rank 16 + noise", "j^-0.5", "j^-0.1", "flat")
RANKS: Final = (4, 16, 64, 128)
QUALITY_SHAPE: Final = (1024, 1536)
"""Of the matrices whose optimum is computed densely, many times over."""


def main() -> int:
    """Run the benchmark."""
    parser = common_arguments(__doc__, runs=3)
    parser.add_argument("--dense-runs", type=int, default=1, help="of each dense SVD; default 1")
    parser.add_argument("--skip-model", action="store_true", help="leave out the 1.1 B pair")
    parser.add_argument("--mergekit", metavar="PROGRAM", help="path of mergekit-extract-lora")
    parser.add_argument("--mergekit-layers", type=int, default=2, help="layers of its pair")
    arguments = parser.parse_args()
    timings, figures, seconds = modules(arguments)
    figures += quality(arguments.scale)
    figures += aftermath(arguments)
    if not arguments.skip_model:
        whole, more = model(arguments, seconds)
        timings += whole
        figures += more
    if arguments.mergekit is not None:
        both, more = mergekit(arguments)
        timings += both
        figures += more
    print_report("extract", timings, figures, as_json=arguments.json)
    return 0


def modules(
    arguments: argparse.Namespace,
) -> tuple[list[Timing], list[Figure], dict[tuple[int, int], float]]:
    """Time single modules both ways in turn; return also the dense seconds by shape."""
    timings, figures, seconds = [], [], {}
    for full in SHAPES:
        shape = (max(64, int(full[0] * arguments.scale)), max(64, int(full[1] * arguments.scale)))
        base = torch.randn(shape, generator=seeded(1)).mul_(0.02).bfloat16()
        tuned = (base.float() + difference("rank 16 + noise", shape, 2) * 1e-2).bfloat16()
        delta = tuned.float() - base.float()
        dense = Timing(f"dense SVD, {shape[0]} x {shape[1]}")
        ours = Timing(f"block Krylov, rank {RANK}, {shape[0]} x {shape[1]}")
        for number in range(max(1, arguments.dense_runs)):
            say(f"run {number + 1}: {dense.name}")
            timed(dense, lambda d=delta: torch.linalg.svd(d, full_matrices=False))
            for _ in range(arguments.runs):
                timed(ours, lambda d=delta: leading_part(d, RANK, np.random.default_rng(3)))
        timings += [dense, ours]
        seconds[full] = dense.wall
        name = f"dense / block Krylov, {shape[0]} x {shape[1]}"
        figures.append(Figure(name, dense.wall / ours.wall, "x", ">= 50"))
    return timings, figures, seconds


def quality(scale: float) -> list[Figure]:
    """Return the largest excess of the error over the optimum, for each kind of spectrum."""
    shape = (max(64, int(QUALITY_SHAPE[0] * scale)), max(96, int(QUALITY_SHAPE[1] * scale)))
    figures = []
    for kind in KINDS:
        delta = difference(kind, shape, 5)
        values = torch.linalg.svdvals(delta.double())
        worst = 0.0
        for rank in (rank for rank in RANKS if rank < shape[0] // 4):
            found = leading_part(delta, rank, np.random.default_rng(6), method="randomised")
            optimum = float(values[rank:].square().sum())
            worst = max(worst, math.sqrt(found.squared_residual / optimum))
        target = "<= 0.01" if kind in ("j^-0.1", "flat") else "<= 0.005"
        figures.append(Figure(f"error / optimum - 1, {kind}", worst - 1, "", target))
    return figures


def aftermath(arguments: argparse.Namespace) -> list[Figure]:
    """Time what comes after the decomposition, to PEFT and to kohya: 144 modules of a U-Net."""
    from loratool.verbs.extraction import pipeline

    decompose = pipeline.decompose_all
    begins: list[float] = []

    def noted(*given: Any, **options: Any) -> Any:
        found = decompose(*given, **options)
        begins.append(time.perf_counter())
        return found

    seconds: dict[str, list[float]] = {"peft": [], "kohya": []}
    with work_folder(arguments) as folder:
        base, tuned = unet_pair(folder)
        pipeline.decompose_all = noted
        try:
            for turn in range(arguments.runs + 1):
                for scheme, found in seconds.items():
                    output = folder / f"{scheme}-{turn}{'.safetensors' * (scheme == 'kohya')}"
                    loratool.extract(base, tuned, output, rank=8, to=scheme)
                    if turn:  # the first one loads modules
                        found.append(time.perf_counter() - begins[-1])
        finally:
            pipeline.decompose_all = decompose
    return [
        Figure(f"after the decomposition, --to {name}", statistics.median(found), "s", "<= 0.1 s")
        for name, found in seconds.items()
    ]


def unet_pair(folder: Path) -> tuple[Path, Path]:
    """Write the attention of Stable Diffusion 1.5's U-Net twice, in float16: 144 modules."""
    generator = np.random.default_rng(0)
    base: dict[str, np.ndarray] = {}
    for place, width in zip(PLACES, WIDTHS, strict=True):
        for leaf, size in sizes_of(width).items():
            name = f"{place}.transformer_blocks.0.{leaf}.weight"
            base[name] = generator.standard_normal(size, np.float32).astype(np.float16)
    tuned = {
        name: (
            weight
            + generator.standard_normal((weight.shape[0], 8), np.float32)
            @ generator.standard_normal((8, weight.shape[1]), np.float32)
        ).astype(np.float16)
        for name, weight in base.items()
    }
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, tensors in zip(paths, (base, tuned), strict=True):
        save_numpy(tensors, path)
    return paths


def model(
    arguments: argparse.Namespace, seconds: dict[tuple[int, int], float]
) -> tuple[list[Timing], list[Figure]]:
    """Extract a whole pair of TinyLlama's sizes, made on the spot."""
    shape = TINY_LLAMA.scaled(arguments.scale)
    with work_folder(arguments) as folder:
        base, tuned = make_pair(folder, shape)
        timings = measure([ours(base, tuned, folder / "out")], arguments.runs)
    whole = timings[0]
    figures = [Figure("loratool extract, peak memory", whole.peak / 1e6, "MB", "<= 1,000")]
    if arguments.scale == 1:
        expected = projected(shape, seconds)
        note = "projected from one dense SVD of 2048 x 5632, by m n min(m, n)"
        figures.append(
            Figure("one dense SVD a weight / extract", expected / whole.wall, "x", "", note)
        )
    return timings, figures


def mergekit(arguments: argparse.Namespace) -> tuple[list[Timing], list[Figure]]:
    """Extract a pair of few layers with both programs, once with mergekit."""
    shape = replace(TINY_LLAMA.scaled(arguments.scale), layers=arguments.mergekit_layers)
    with work_folder(arguments) as folder:
        base, tuned = make_pair(folder, shape)
        output = folder / "mergekit"
        options = ["--max-rank", str(RANK), "--exclude-regex", "lm_head|embed_tokens"]
        options += ["--base-model", str(base), "--model", str(tuned), "--out-path", str(output)]
        theirs = Command("mergekit-extract-lora", [arguments.mergekit, *options], output, at_most=1)
        commands = [ours(base, tuned, folder / "out"), theirs]
        timings = measure(commands, arguments.runs)
        errors = []
        for command in commands:
            say(f"error of {command.name}")
            subprocess.run([str(part) for part in command.argv], check=True, capture_output=True)
            errors.append(relative_error(base, tuned, command.output or folder))
    ratio, memory = timings[1].wall / timings[0].wall, timings[1].peak / timings[0].peak
    name = f"{shape.layers} layers"
    return timings, [
        Figure(f"mergekit-extract-lora / extract, {name}", ratio, "x"),
        Figure(f"its peak memory / extract's, {name}", memory, "x"),
        Figure("relative error, extract", errors[0]),
        Figure("relative error, mergekit-extract-lora", errors[1]),
    ]


def ours(base: Path, tuned: Path, output: Path) -> Command:
    """Return how to extract with loratool."""
    options = ["--rank", str(RANK), "-o", output, "-q"]
    return Command(
        "loratool extract", [*loratool_command(), "extract", base, tuned, *options], output
    )


def make_pair(folder: Path, shape: LlamaShape) -> tuple[Path, Path]:
    """Write a base and the same with an adapter merged in, and bring both into the page cache."""
    say("making a pair of models")
    base = make_base(folder / "base", shape)
    adapter = make_adapter(folder / "adapter", shape, ALL_LINEAR)
    tuned = folder / "tuned"
    merge = [*loratool_command(), "merge", base, adapter, "-o", tuned, "-q"]
    subprocess.run([str(part) for part in merge], check=True)
    for path in (base, tuned):
        read_through(path)
    return base, tuned


def relative_error(base: Path, tuned: Path, adapter: Path) -> float:
    """Return ‖Δ - scale B A‖ / ‖Δ‖ over all projections, from the files, in float64."""
    factors = tensors_of(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    before, after = tensors_of(base), tensors_of(tuned)
    missed = total = 0.0
    for name in (name for name in before if name.endswith("_proj.weight")):
        delta = after[name].double() - before[name].double()
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        up, down = (factors[f"{stem}.lora_{side}.weight"].double() for side in "BA")
        total += float(delta.square().sum())
        missed += float((delta - scale * (up @ down)).square().sum())
    return math.sqrt(missed / total)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's safetensors files."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def projected(shape: LlamaShape, seconds: dict[tuple[int, int], float]) -> float:
    """Return what a dense SVD of every projection would take."""
    known = (2048, 5632)
    rate = seconds[known] / work(known)
    return shape.layers * sum(rate * work(shape.linear(name)) for name in ALL_LINEAR)


def work(shape: tuple[int, int]) -> float:
    """Return what a dense SVD's time grows with."""
    return shape[0] * shape[1] * min(shape)


def difference(kind: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Return a difference with a spectrum of some kind."""
    m, n = shape
    if kind == "flat":
        return torch.randn(shape, generator=seeded(seed))
    if kind.startswith("rank"):
        low = torch.randn(m, RANK, generator=seeded(seed))
        low = low @ torch.randn(RANK, n, generator=seeded(seed + 1)) / math.sqrt(m)
        return low + 0.01 * torch.randn(shape, generator=seeded(seed + 2))
    count = min(shape)
    U, V = (
        torch.linalg.qr(torch.randn(size, count, generator=seeded(seed + size))).Q for size in shape
    )
    return (U * torch.arange(1, count + 1) ** -float(kind.partition("-")[2])) @ V.mT


def seeded(seed: int) -> torch.Generator:
    """Return a generator."""
    return torch.Generator().manual_seed(seed)


def timed(timing: Timing, call: Callable[[], object]) -> None:
    """Note what one call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    timing.walls.append(time.perf_counter() - wall)
    timing.cpus.append(time.process_time() - cpu)
    timing.peaks.append(0)


if __name__ == "__main__":
    sys.exit(main())
