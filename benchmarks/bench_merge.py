"""How long ``loratool merge`` takes against a copy of the base, how much memory, how precisely.

The base has TinyLlama's sizes (1.1 B parameters in bfloat16) and random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from harness import (
    ALL_LINEAR,
    ALPHA,
    PYTHON,
    RANK,
    TINY_LLAMA,
    Command,
    Figure,
    LlamaShape,
    Timing,
    clear,
    common_arguments,
    loratool_command,
    make_adapter,
    make_base,
    measure,
    module_name,
    print_report,
    read_through,
    say,
    work_folder,
)

COPY: Final = "cp -r"
IMPORT: Final = "python -c pass"
ALL: Final = "merge, all linear"
QUERY_VALUE: Final = "merge, q and v"
PEFT: Final = "PEFT, all linear"
PEFT_RUNS: Final = 3
PEFT_MERGE: Final = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""
ROWS: Final = 256
"""Rows of a weight that are checked at a time."""


def main() -> int:
    """Run the benchmark."""
    arguments = parse_arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    shape = TINY_LLAMA.scaled(arguments.scale)
    with work_folder(arguments) as folder:
        say("making the base and the adapters")
        inputs = make_inputs(folder, shape)
        read_through(inputs.base)
        timings = measure(commands(inputs, folder, peft=arguments.peft), arguments.runs)
        found = [*speed(timings), *memory(timings), *precision(inputs, folder, shape)]
        if arguments.layers > 1:
            peak = by_name(timings, ALL).peak
            found += deeper_memory(folder, shape, arguments.layers, peak)
    if arguments.scale != 1:
        say("the targets are those of --scale 1")
    parameters = sum(spec.elements for spec in shape.tensors())
    title = f"merge, {parameters / 1e9:.2f} B parameters in bfloat16"
    print_report(title, timings, found, as_json=arguments.json)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = common_arguments(__doc__, runs=5)
    parser.add_argument(
        "--peft", action="store_true", help=f"also time PEFT (at most {PEFT_RUNS} runs; slow)"
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=1,
        metavar="N",
        help="also merge into a base with N times the layers, and compare the peak memory",
    )
    return parser.parse_args()


@dataclass(frozen=True)
class Inputs:
    """Where the base is, and an adapter on all projections and one on two."""

    base: Path
    all_linear: Path
    query_value: Path


def make_inputs(folder: Path, shape: LlamaShape) -> Inputs:
    """Write a base and two adapters."""
    return Inputs(
        base=make_base(folder / "base", shape),
        all_linear=make_adapter(folder / "all-linear", shape, ALL_LINEAR),
        query_value=make_adapter(folder / "query-value", shape, ("q_proj", "v_proj")),
    )


def merge_command(base: Path, adapter: Path, output: Path, *options: str) -> list[str | Path]:
    """Return the command that merges ``adapter`` into ``base``."""
    return [*loratool_command(), "merge", base, adapter, "-o", output, *options]


def commands(inputs: Inputs, folder: Path, *, peft: bool) -> list[Command]:
    """Return the rows of the table."""
    base, output = inputs.base, folder / "output"
    rows = [
        Command(COPY, ["cp", "-r", base, output], output),
        Command(IMPORT, [PYTHON, "-c", "pass"]),
        Command(ALL, merge_command(base, inputs.all_linear, output), output),
        Command(QUERY_VALUE, merge_command(base, inputs.query_value, output), output),
    ]
    if peft:
        script = [PYTHON, "-c", PEFT_MERGE, base, inputs.all_linear, output]
        rows.append(Command(PEFT, script, output, at_most=PEFT_RUNS))
    return rows


def by_name(timings: Sequence[Timing], name: str) -> Timing:
    """Return the timing of one row."""
    return next(timing for timing in timings if timing.name == name)


# ------------------------------------------------------------------------------ speed and memory


def speed(timings: Sequence[Timing]) -> Iterator[Figure]:
    """Yield wall times of whole processes by that of the copy, and what starting up takes."""
    copy, start = by_name(timings, COPY), by_name(timings, IMPORT)
    for name, target in ((ALL, "at most 1.3 and 0.25 s"), (QUERY_VALUE, "at most 0.9 and 0.25 s")):
        timing = by_name(timings, name)
        each = [wall / copied for wall, copied in zip(timing.walls, copy.walls, strict=True)]
        least = min(timing.walls) / min(copy.walls)
        note = f"rounds {min(each):.2f} to {max(each):.2f}; minima {least:.2f}"
        yield Figure(f"{name} / cp", timing.wall / copy.wall, "", target, note)
        over = timing.wall - 1.3 * copy.wall - start.wall
        yield Figure(f"{name}: over 1.3 × cp", over, "s", "at most 0.25")
    if timings[-1].name == PEFT:
        ratio = timings[-1].wall / by_name(timings, ALL).wall
        yield Figure("PEFT / merge, wall", ratio, "×", "at least 3", "whole processes")


def memory(timings: Sequence[Timing]) -> Iterator[Figure]:
    """Yield the peaks of the merges, and that of PEFT against them."""
    for name in (ALL, QUERY_VALUE):
        yield Figure(f"{name}: peak", by_name(timings, name).peak / 1e6, "MB", "at most 120")
    if timings[-1].name == PEFT:
        ratio = timings[-1].peak / by_name(timings, ALL).peak
        yield Figure("PEFT / merge, peak", ratio, "×", "at least 10")


def deeper_memory(folder: Path, shape: LlamaShape, factor: int, peak: int) -> Iterator[Figure]:
    """Merge into a base with ``factor`` times the layers, and yield its peak against ``peak``."""
    say(f"making a base with {factor} times the layers")
    deeper = shape.deeper(factor)
    base = make_base(folder / "deeper-base", deeper)
    adapter = make_adapter(folder / "deeper-adapter", deeper, ALL_LINEAR)
    output = folder / "output"
    name = f"merge, {factor} × the layers"
    command = Command(name, merge_command(base, adapter, output), output)
    (timing,) = measure([command], 1, warm_up=False)
    gigabytes = sum(spec.nbytes for spec in deeper.tensors()) / 1e9
    note = f"base of {gigabytes:.1f} GB, {timing.wall:.1f} s"
    yield Figure(f"{name}: peak", timing.peak / 1e6, "MB", "at most 500", note)
    yield Figure(f"{name}: growth", timing.peak / peak, "×", "about 1", "peak / peak")


# ------------------------------------------------------------------------------------- precision


def precision(inputs: Inputs, folder: Path, shape: LlamaShape) -> Iterator[Figure]:
    """Merge once into bfloat16 and once into float32, and yield how near float64 they are."""
    say("checking the precision")
    names = checked_modules(shape)
    output = folder / "output"
    measure(
        [Command("merge", merge_command(inputs.base, inputs.all_linear, output))], 1, warm_up=False
    )
    equal = [equal_share(inputs, output, name) for name in names]
    clear(output)
    share = sum(count for count, _ in equal) / sum(total for _, total in equal)
    note = f"{len(names)} tensors"
    yield Figure("bfloat16: not float64's bits", 100 * (1 - share), "%", "at most 0.1", note)
    wide = merge_command(inputs.base, inputs.all_linear, output, "--dtype", "float32")
    measure([Command("merge, float32", wide)], 1, warm_up=False)
    errors = [errors_of(inputs, output, name) for name in names]
    clear(output)
    norm, element = (max(column) for column in zip(*errors, strict=True))
    yield Figure("float32: error in norm", norm, "", "at most 1e-6", "‖got - want‖ / ‖want‖")
    yield Figure("float32: error of an element", element, "", "", "max |got - want| / max |W|")


def checked_modules(shape: LlamaShape) -> list[str]:
    """Return the projections of the first layer and of the last."""
    layers = sorted({0, shape.layers - 1})
    return [module_name(layer, projection) for layer in layers for projection in ALL_LINEAR]


def equal_share(inputs: Inputs, output: Path, module: str) -> tuple[int, int]:
    """Return how many bit patterns of a merged weight are those of float64, and of how many."""
    equal = total = 0
    for got, want, _ in blocks(inputs, output, module):
        bits = bfloat16_bits(want)
        equal += int(np.count_nonzero(got == bits))
        total += bits.size
    return equal, total


def errors_of(inputs: Inputs, output: Path, module: str) -> tuple[float, float]:
    """Return the relative error in norm, and the largest of an element relative to the weight."""
    difference = reference = worst = largest = 0.0
    for got, want, weight in blocks(inputs, output, module):
        error = got.astype(np.float64) - want
        difference += float(np.square(error).sum())
        reference += float(np.square(want).sum())
        worst = max(worst, float(np.abs(error).max()))
        largest = max(largest, float(np.abs(weight).max()))
    return (difference / reference) ** 0.5, worst / largest


def blocks(
    inputs: Inputs, output: Path, module: str
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield rows of the merged weight as stored, and as float64 they should be, and the base's.

    bfloat16 comes as its bits (uint16).
    """
    down, up = factors(inputs.all_linear, module)
    pairs = zip(
        stored_rows(output, f"{module}.weight"),
        stored_rows(inputs.base, f"{module}.weight"),
        strict=True,
    )
    for number, (got, base) in enumerate(pairs):
        weight = from_bfloat16(base)
        want = weight + (ALPHA / RANK) * (up[number * ROWS : (number + 1) * ROWS] @ down)
        yield got, want, weight


def factors(adapter: Path, module: str) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of a module in float64."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as file:
        down, up = (
            file.get_tensor(f"base_model.model.{module}.lora_{letter}.weight").astype(np.float64)
            for letter in "AB"
        )
    return down, up


def stored_rows(model: Path, name: str) -> Iterator[np.ndarray]:
    """Yield a stored weight by blocks of rows: float32, or the bits of bfloat16."""
    import torch
    from safetensors import safe_open

    index = json.loads((model / "model.safetensors.index.json").read_text(encoding="utf-8"))
    with safe_open(model / index["weight_map"][name], framework="pt") as file:
        stored = file.get_slice(name)
        for start in range(0, stored.get_shape()[0], ROWS):
            rows = stored[start : start + ROWS]
            if rows.dtype == torch.bfloat16:
                yield rows.view(torch.int16).numpy().view(np.uint16)
            else:
                yield rows.numpy()


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return the values of bfloat16 bits as float64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Round float64 to bfloat16 once, to nearest and ties to even; return the bits.

    By way of float32 there would be two roundings. The two neighbours are found through float32
    all the same, but the choice between them compares distances in float64, which are exact.
    """
    magnitude = np.abs(values)
    lower = (magnitude.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    upper = lower + np.uint16(1)
    below = magnitude - from_bfloat16(lower)
    above = from_bfloat16(upper) - magnitude
    is_upper = (above < below) | ((above == below) & (lower % 2 == 1))
    sign = np.signbit(values).astype(np.uint16) << 15
    return np.where(is_upper, upper, lower) | sign


if __name__ == "__main__":
    sys.exit(main())
