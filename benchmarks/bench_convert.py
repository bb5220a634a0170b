"""Convert an adapter of 200 MB, side by side with ``cp`` of the same file, and one of 800 MB."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from harness import (
    ALL_LINEAR,
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
TARGETS: Final = ("comfy", "kohya", "module-path", "mlx")
"""Names alone; names and a hash of all data; a scale folded into B; transposed factors."""
LARGER: Final = 4


def main() -> int:
    """Run the benchmark."""
    parser = common_arguments(__doc__, runs=9)
    arguments = parser.parse_args()
    with work_folder(arguments) as folder:
        shape = TINY_LLAMA.scaled(arguments.scale)
        small = make_adapter(folder / "small", shape, ALL_LINEAR, rank=1)
        usual = make_adapter(folder / "usual", shape, ALL_LINEAR, rank=RANK)
        large = make_adapter(folder / "large", shape.deeper(LARGER), ALL_LINEAR, rank=RANK)
        for adapter in (small, usual, large):
            read_through(adapter)
        timings = measure(list(commands(small, usual, large, folder)), arguments.runs)
        size = (usual / "adapter_model.safetensors").stat().st_size
    title = f"convert, {size / 1e6:.0f} MB and {LARGER} times as much"
    print_report(title, timings, figures(timings), as_json=arguments.json)
    return 0


def commands(small: Path, usual: Path, large: Path, folder: Path) -> list[Command]:
    """Return the rows: copies, conversions, and what a conversion takes without the bytes."""
    copy = folder / "copy.safetensors"

    def convert(name: str, adapter: Path, target: str) -> Command:
        output = folder / ("made" if target == "mlx" else "made.safetensors")
        argv = [*loratool_command(), "convert", adapter, "--to", target, "-q", "-o", output]
        return Command(name, argv, output)

    def cp(name: str, adapter: Path) -> Command:
        return Command(name, ["cp", adapter / "adapter_model.safetensors", copy], copy)

    return [
        cp("cp", usual),
        convert("start-up: the same at rank 1", small, "comfy"),
        *(convert(f"--to {target}", usual, target) for target in TARGETS),
        cp("cp, large", large),
        convert("--to comfy, large", large, "comfy"),
    ]


def figures(timings: list[Timing]) -> list[Figure]:
    """Return the ratios to ``cp``, whole and without the start-up, and the peaks of memory."""
    copy, start, *made = timings[:-2]
    large_copy, large = timings[-2:]
    found = [Figure("start-up / cp", start.wall / copy.wall)]
    for timing in made:
        found += [
            Figure(f"{timing.name} / cp", timing.wall / copy.wall, target="at most 1.5"),
            Figure(f"{timing.name}, net / cp", (timing.wall - start.wall) / copy.wall),
            Figure(f"{timing.name}, peak", timing.peak / 1e6, "MB"),
        ]
    found += [
        Figure("--to comfy / cp, large", large.wall / large_copy.wall, target="at most 1.5"),
        Figure("--to comfy, net / cp, large", (large.wall - start.wall) / large_copy.wall),
        Figure("--to comfy, peak, large", large.peak / 1e6, "MB", "as for the smaller"),
    ]
    return found


if __name__ == "__main__":
    sys.exit(main())
