"""Convert an adapter of 200 MB, side by side with ``cp`` of the same file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from harness import (
    ALL_LINEAR,
    PYTHON,
    TINY_LLAMA,
    Command,
    Figure,
    Timing,
    common_arguments,
    loratool_command,
    make_adapter,
    measure,
    print_report,
    read_through,
    work_folder,
)

RANK: Final = 64
"""Of TinyLlama's linear layers: 202 MB in float32."""
TARGETS: Final = ("module-path", "kohya", "mlx", "comfy")
"""A scale that is folded into B, one recorded in alphas (and hashed), transposed, and native."""


def main() -> int:
    """Run the benchmark."""
    parser = common_arguments(__doc__, runs=9)
    arguments = parser.parse_args()
    with work_folder(arguments) as folder:
        shape = TINY_LLAMA.scaled(arguments.scale)
        adapter = make_adapter(folder / "adapter", shape, ALL_LINEAR, rank=RANK)
        weights = adapter / "adapter_model.safetensors"
        size = weights.stat().st_size
        read_through(adapter)
        timings = measure(commands(adapter, weights, folder), arguments.runs)
    title = f"convert, {size / 1e6:.0f} MB"
    print_report(title, timings, figures(timings), as_json=arguments.json)
    return 0


def commands(adapter: Path, weights: Path, folder: Path) -> list[Command]:
    """Return the rows: ``cp``, an interpreter that does nothing, and conversions."""
    copy, made = folder / "copy.safetensors", folder / "made.safetensors"
    rows = [
        Command("cp", ["cp", weights, copy], copy),
        Command("python -c pass", [PYTHON, "-c", "pass"]),
    ]
    for target in TARGETS:
        output = folder / "made" if target == "mlx" else made
        convert = [*loratool_command(), "convert", adapter, "--to", target, "-q", "-o", output]
        rows.append(Command(f"convert --to {target}", convert, output))
    return rows


def figures(timings: list[Timing]) -> list[Figure]:
    """Return the ratios to ``cp`` and the peaks of memory."""
    copy = timings[0]
    found = []
    for timing in timings[2:]:
        ratio = timing.wall / copy.wall
        found.append(Figure(f"{timing.name} / cp", ratio, target="at most 1.5"))
        found.append(Figure(f"{timing.name}, peak", timing.peak / 1e6, "MB"))
    return found


if __name__ == "__main__":
    sys.exit(main())
