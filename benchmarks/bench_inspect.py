"""How long ``loratool inspect`` takes on an adapter with 1,000 tensors, and how much memory."""

from __future__ import annotations

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

TENSORS_PER_LAYER: Final = 2 * len(ATTENTION)


def main() -> int:
    """Run the benchmark."""
    parser = common_arguments(__doc__, runs=15)
    parser.add_argument("--tensors", type=int, default=1000, help="default 1000")
    arguments = parser.parse_args()
    layers = max(1, round(arguments.tensors * arguments.scale / TENSORS_PER_LAYER))
    with work_folder(arguments) as folder:
        shape = LlamaShape(layers=layers, hidden=1024, intermediate=64, kv=256, vocabulary=64)
        adapter = make_adapter(folder / "adapter", shape, ATTENTION)
        timings = measure(commands(adapter), arguments.runs)
    title = f"inspect, {layers * TENSORS_PER_LAYER} tensors"
    print_report(title, timings, figures(timings), as_json=arguments.json)
    return 0


def commands(adapter: Path) -> list[Command]:
    """Return the rows: an interpreter that does nothing, and both forms of the command."""
    inspect = [*loratool_command(), "inspect", adapter]
    return [
        Command("python -c pass", [PYTHON, "-c", "pass"]),
        Command("inspect", inspect),
        Command("inspect --json", [*inspect, "--json"]),
    ]


def figures(timings: list[Timing]) -> list[Figure]:
    """Return what each form costs over the bare interpreter, and its peak memory."""
    nothing = timings[0]
    found: list[Figure] = []
    for timing in timings[1:]:
        over = timing.wall - nothing.wall
        least = min(timing.walls) - min(nothing.walls)
        found.append(
            Figure(f"{timing.name}, over pass", over, "s", "at most 0.25", f"of minima {least:.3f}")
        )
        found.append(Figure(f"{timing.name}, peak", timing.peak / 1e6, "MB", "at most 40"))
    return found


if __name__ == "__main__":
    sys.exit(main())
