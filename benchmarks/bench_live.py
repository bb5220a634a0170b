"""A live layer against PEFT's: forward pass, switching, and the memory of ten adapters."""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Final

import torch
from harness import Figure, Timing, common_arguments, print_report, say
from peft import LoraConfig, get_peft_model
from torch import nn

from loratool.live import attach

SHAPES: Final = ((768, 768, 128), (2048, 2048, 64), (4096, 4096, 16))
"""Inputs, outputs, tokens."""
RANK: Final = 16
ADAPTERS: Final = 10


def main() -> int:
    """Run the benchmark."""
    arguments = common_arguments(__doc__, runs=200).parse_args()
    torch.set_num_threads(1)
    timings: list[Timing] = []
    figures: list[Figure] = []
    for into, out, tokens in SHAPES:
        shape = f"{into} x {out}, {tokens} tokens"
        x = torch.randn(1, tokens, into)
        base = nn.Sequential(nn.Linear(into, out)).eval()
        mine = nn.Sequential(nn.Linear(into, out)).eval()
        theirs = nn.Sequential(nn.Linear(into, out)).eval()
        attach(mine, targets=["0"], rank=RANK)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = get_peft_model(theirs, LoraConfig(r=RANK, target_modules=["0"])).eval()
        rows = [
            (Timing(f"base, {shape}"), lambda m=base, v=x: m(v)),
            (Timing(f"live, {shape}"), lambda m=mine, v=x: m(v)),
            (Timing(f"PEFT, {shape}"), lambda m=theirs, v=x: m(v)),
        ]
        say(f"forward, {shape}")
        with torch.no_grad():
            interleaved(rows, arguments.runs)
        timings += [timing for timing, _ in rows]
        ratio = rows[1][0].wall / rows[2][0].wall
        figures.append(Figure(f"forward, live / PEFT, {shape}", ratio, "x"))
    figures += switching(arguments.runs)
    figures += memory()
    print_report("live layers", timings, figures, as_json=arguments.json)
    return 0


def interleaved(rows: list[tuple[Timing, Callable[[], object]]], runs: int) -> None:
    """Time calls in turn."""
    for _ in range(5):
        for _, call in rows:
            call()
    for _ in range(runs):
        for timing, call in rows:
            begin, cpu = time.perf_counter(), time.process_time()
            call()
            timing.walls.append(time.perf_counter() - begin)
            timing.cpus.append(time.process_time() - cpu)
            timing.peaks.append(0)


def blocks() -> nn.Sequential:
    """Return two dozen layers, as q and v of twelve layers are."""
    return nn.Sequential(*(nn.Linear(768, 768) for _ in range(24)))


def switching(runs: int) -> list[Figure]:
    """Return how long it takes to make another adapter active, on 24 layers."""
    targets = [str(index) for index in range(24)]
    live = attach(blocks(), targets=targets, name="a", rank=RANK)
    attach(live.model, targets=targets, name="b", rank=RANK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(blocks(), LoraConfig(r=RANK, target_modules=targets), "a")
        peft.add_adapter("b", LoraConfig(r=RANK, target_modules=targets))
    found: dict[str, list[float]] = {"live": [], "PEFT": []}
    for number in range(runs):
        name = "ab"[number % 2]
        for key, switch in (("live", live.activate), ("PEFT", peft.set_adapter)):
            begin = time.perf_counter()
            switch(name)
            found[key].append(time.perf_counter() - begin)
    return [
        Figure(f"switching, 24 layers, {key}", statistics.median(values) * 1e6, "µs")
        for key, values in found.items()
    ]


def memory() -> list[Figure]:
    """Return the bytes that ten adapters take, over those of their factors."""
    model = blocks()
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    targets = [str(index) for index in range(24)]
    for number in range(ADAPTERS):
        attach(model, targets=targets, name=f"n{number}", rank=RANK)
    after = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    factors = ADAPTERS * 24 * RANK * (768 + 768) * 4
    return [
        Figure("ten adapters, over their factors", (after - before) / factors, "x", "1"),
        Figure("ten adapters, share of the base", (after - before) / before, ""),
    ]


if __name__ == "__main__":
    sys.exit(main())
