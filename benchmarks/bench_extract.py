"""``loratool extract`` against ``torch.svd_lowrank``, dense SVDs, its floor and mergekit itself.

The floor of a whole run is reading both files and the products that the decompositions take.
mergekit-extract-lora comes from its own environment (``--mergekit PROGRAM``): both then work on
the same pair of models, as whole processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from harness import (
    ALL_LINEAR,
    PLACES,
    PYTHON,
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
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits

import loratool
from loratool.math.extraction import leading_part
from loratool.math.krylov import basis_size

RANK: Final = 16
SHAPES: Final = ((4096, 4096), (2048, 5632), (4096, 11008))
TIMED_RANKS: Final = (16, 64, 256)
LIMITS: Final = {16: 1.0, 64: 1.3, 256: 1.3}
"""How much longer than ``svd_lowrank(q=rank, niter=2)`` a decomposition may take."""
ITERATIONS: Final = (2, 3, 4, 5, 6, 8, 10, 12)
DOZEN: Final = {"q_proj": (4096, 4096), "up_proj": (5632, 2048), "down_proj": (2048, 5632)}
KINDS: Final = ("rank 16 + noise", "j^-1", "j^-0.5", "j^-0.1", "flat")
RANKS: Final = (4, 16, 64, 128, 192)
PLAIN: Final = """
import sys
import torch
from safetensors.torch import load_file, save_file

base, tuned = (load_file(f"{folder}/model.safetensors") for folder in sys.argv[1:3])
factors = {}
for name, weight in base.items():
    U, S, V = torch.svd_lowrank(tuned[name].float() - weight.float(), q=int(sys.argv[3]), niter=2)
    factors[f"{name}.lora_B"] = (U * S.sqrt()).bfloat16()
    factors[f"{name}.lora_A"] = (V * S.sqrt()).mT.contiguous().bfloat16()
save_file(factors, sys.argv[4])
"""
"""What people write instead."""
QUALITY_SHAPE: Final = (1024, 1536)
"""Of the matrices whose optimum is computed densely, many times over."""


def main() -> int:
    """Run the benchmark."""
    parser = common_arguments(__doc__, runs=3)
    parser.add_argument("--dense-runs", type=int, default=1, help="of each dense SVD; default 1")
    parser.add_argument("--skip-model", action="store_true", help="leave out the 1.1 B pair")
    parser.add_argument("--against", metavar="CHECKOUT", help="time another checkout beside it")
    parser.add_argument("--mergekit", metavar="PROGRAM", help="path of mergekit-extract-lora")
    parser.add_argument("--mergekit-layers", type=int, default=2, help="layers of its pair")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        timings, figures = modules(arguments)
    dense, more = dense_modules(arguments)
    timings += dense
    figures += more + quality(arguments.scale) + aftermath(arguments)
    whole, more = dozen(arguments)
    timings += whole
    figures += more
    if not arguments.skip_model:
        whole, more = model(arguments)
        timings += whole
        figures += more
    if arguments.mergekit is not None:
        both, more = mergekit(arguments)
        timings += both
        figures += more
    print_report("extract", timings, figures, as_json=arguments.json)
    return 0


def scaled(shape: tuple[int, int], arguments: argparse.Namespace) -> tuple[int, int]:
    """Return a shape as large as ``--scale`` has it."""
    m, n = (max(64, int(size * arguments.scale)) for size in shape)
    return m, n


def bf16_pair(shape: tuple[int, int]) -> torch.Tensor:
    """Return the difference of a bfloat16 pair, in float32."""
    base = torch.randn(shape, generator=seeded(1)).mul_(0.02).bfloat16()
    tuned = (base.float() + difference("rank 16 + noise", shape, 2) * 1e-2).bfloat16()
    return tuned.float() - base.float()


def modules(arguments: argparse.Namespace) -> tuple[list[Timing], list[Figure]]:
    """Decompose single differences in turn with torch's own procedure, each on one thread."""
    timings, figures = [], []
    for full in SHAPES:
        shape = scaled(full, arguments)
        delta = bf16_pair(shape)
        values = delta.numpy()
        for rank in (rank for rank in TIMED_RANKS if rank < min(shape) // 3):
            name = f"rank {rank}, {shape[0]} x {shape[1]}"
            ours, theirs = Timing(f"extract's, {name}"), Timing(f"svd_lowrank, niter 2, {name}")
            for _ in range(arguments.runs + 1):
                timed(ours, lambda d=values, r=rank: leading_part(d, r, np.random.default_rng(3)))
                timed(theirs, lambda d=delta, r=rank: torch.svd_lowrank(d, q=r, niter=2))
            for timing in (ours, theirs):  # the first ones warm up
                del timing.walls[0], timing.cpus[0], timing.peaks[0]
            timings += [ours, theirs]
            ratio = statistics.median(
                one / other for one, other in zip(ours.walls, theirs.walls, strict=True)
            )
            figures.append(Figure(f"{name} / svd_lowrank", ratio, "x", f"<= {LIMITS[rank]}"))
            seconds, niter = as_near(delta, rank)
            note = f"niter {niter} is the first as near" if niter else "none to 12 is as near"
            figures.append(
                Figure(f"{name} / svd_lowrank as near", ours.wall / seconds, "x", "< 1", note)
            )
    return timings, figures


def as_near(delta: torch.Tensor, rank: int) -> tuple[float, int]:
    """Return what the first svd_lowrank takes whose error is ours or less, and its iterations."""
    found = leading_part(delta.numpy(), rank, np.random.default_rng(3))
    seconds = math.inf
    for niter in ITERATIONS:
        begin = time.perf_counter()
        U, S, V = torch.svd_lowrank(delta, q=rank, niter=niter)
        seconds = time.perf_counter() - begin
        error = float((delta - (U * S) @ V.mT).double().square().sum())
        if error <= found.squared_residual * (1 + 1e-6):
            return seconds, niter
    return seconds, 0


def dense_modules(arguments: argparse.Namespace) -> tuple[list[Timing], list[Figure]]:
    """Time a dense SVD of the two smaller shapes."""
    timings, figures = [], []
    for full in SHAPES[:2]:
        shape = scaled(full, arguments)
        delta = bf16_pair(shape)
        values = delta.numpy()
        dense = Timing(f"dense SVD, {shape[0]} x {shape[1]}")
        ours = Timing(f"extract's beside it, rank {RANK}, {shape[0]} x {shape[1]}")
        for number in range(max(1, arguments.dense_runs)):
            say(f"run {number + 1}: {dense.name}")
            timed(dense, lambda d=delta: torch.linalg.svd(d, full_matrices=False))
            timed(ours, lambda d=values: leading_part(d, RANK, np.random.default_rng(3)))
        timings += [dense, ours]
        name = f"dense SVD / extract's, {shape[0]} x {shape[1]}"
        figures.append(Figure(name, dense.wall / ours.wall, "x", ">= 50"))
    return timings, figures


def dozen(arguments: argparse.Namespace) -> tuple[list[Timing], list[Figure]]:
    """Extract twelve modules as whole processes, beside a plain script of svd_lowrank."""
    timings, figures = [], []
    with work_folder(arguments) as folder:
        pair = folder / "dozen-base", folder / "dozen-tuned"
        tensors: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
        for layer in range(4):
            for name, full in DOZEN.items():
                shape = scaled(full, arguments)
                weight = torch.randn(shape, generator=seeded(layer)).mul_(0.02).bfloat16()
                change = difference("rank 16 + noise", shape, layer) * 1e-2
                key = f"model.layers.{layer}.{name}.weight"
                tensors[0][key] = weight
                tensors[1][key] = (weight.float() + change).bfloat16()
        for path, each in zip(pair, tensors, strict=True):
            path.mkdir()
            save_file(each, path / "model.safetensors")
        for rank in TIMED_RANKS:
            out, plain = folder / f"dozen-{rank}", folder / f"dozen-{rank}.safetensors"
            options = ["extract", *pair, "--rank", str(rank), "-o", out, "-q"]
            commands = [
                Command(f"extract, 12 modules, rank {rank}", [*loratool_command(), *options], out),
                Command(
                    f"svd_lowrank script, 12 modules, rank {rank}",
                    [PYTHON, "-c", PLAIN, *pair, str(rank), plain],
                    plain,
                ),
            ]
            if arguments.against is not None:
                commands.append(other_checkout(arguments.against, options, out))
            found = measure(commands, arguments.runs)
            timings += found
            name = f"extract / script, 12 modules, rank {rank}"
            figures.append(Figure(name, found[0].wall / found[1].wall, "x", "< 1"))
    return timings, figures


def other_checkout(checkout: str, options: list[Any], output: Path) -> Command:
    """Return how to do the same with another checkout."""
    argv = ["/usr/bin/env", f"PYTHONPATH={checkout}", PYTHON, "-m", "loratool", *options]
    return Command("the same, other checkout", argv, output)


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
        figures.append(Figure(f"error / optimum - 1, {kind}", worst - 1, "", "<= 0.005"))
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


def model(arguments: argparse.Namespace) -> tuple[list[Timing], list[Figure]]:
    """Extract a whole pair of TinyLlama's sizes, made on the spot, beside the floor."""
    shape = TINY_LLAMA.scaled(arguments.scale)
    timings, figures = [], []
    with work_folder(arguments) as folder:
        pair = make_pair(folder, shape)
        for rank in (16, 64):
            out = folder / f"out-{rank}"
            options = ["extract", *pair, "--rank", str(rank), "-o", out, "-q"]
            commands = [
                Command(
                    f"extract, 1.1 B parameters, rank {rank}", [*loratool_command(), *options], out
                )
            ]
            if arguments.against is not None:
                commands.append(other_checkout(arguments.against, options, out))
            floors = []
            for _ in range(arguments.runs):
                floors.append(floor_of(pair, shape, rank))
                found = measure(commands, 1, warm_up=False)
                for timing, one in zip(timings[-len(commands) :], found, strict=False):
                    if timing.name == one.name:
                        timing.walls += one.walls
                        timing.cpus += one.cpus
                        timing.peaks += one.peaks
                if not any(timing.name == found[0].name for timing in timings):
                    timings += found
            whole = next(timing for timing in timings if timing.name == commands[0].name)
            read, products = (statistics.median(each) for each in zip(*floors, strict=True))
            note = f"reading {read:.2f} s, products {products:.2f} s on all cores"
            figures.append(
                Figure(
                    f"extract / floor, 1.1 B, rank {rank}",
                    whole.wall / (read + products),
                    "x",
                    "<= 1.4",
                    note,
                )
            )
            figures.append(
                Figure(f"peak memory, 1.1 B, rank {rank}", whole.peak / 1e6, "MB", "<= 400")
            )
    return timings, figures


def floor_of(pair: tuple[Path, Path], shape: LlamaShape, rank: int) -> tuple[float, float]:
    """Return seconds for reading both models, and for the products, each on all cores."""
    cores = len(os.sched_getaffinity(0))
    files = [file for path in pair for file in sorted(path.glob("*.safetensors"))]
    begin = time.perf_counter()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(read_file, files))
    read = time.perf_counter() - begin
    seconds = 0.0
    with threadpool_limits(1):
        for rows, columns in sorted({shape.linear(name) for name in ALL_LINEAR}):
            delta = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
            size = basis_size(rank, (rows, columns))
            blocks = 2 if size == 2 * (rank + 8) else 3
            right = np.ones((columns, size // blocks), np.float32)
            left = np.ones((rows, size // blocks), np.float32)
            alike = sum(shape.linear(name) == (rows, columns) for name in ALL_LINEAR)

            def work(
                *, d: np.ndarray = delta, one: np.ndarray = right, other: np.ndarray = left
            ) -> None:
                d @ one, other.T @ d

            work()
            begin = time.perf_counter()
            with ThreadPoolExecutor(cores) as pool:
                list(pool.map(lambda _: work(), range(cores)))
            each = (time.perf_counter() - begin) / cores
            seconds += each * blocks * alike * shape.layers
    return read, seconds


def read_file(path: Path) -> None:
    """Read a file into memory that is used again."""
    buffer = bytearray(16 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


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
