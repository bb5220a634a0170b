"""How long ``loratool inspect`` takes on a folder of 1,000 adapters of 64 modules."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

from harness import (
    ALPHA,
    ATTENTION,
    PYTHON,
    RANK,
    Command,
    Figure,
    Timing,
    common_arguments,
    loratool_command,
    measure,
    module_name,
    print_report,
    work_folder,
)

from loratool.files.safetensors import canonical_order, format_header
from loratool.files.spec import TensorSpec

LAYERS: Final = 16
HIDDEN: Final = 4096


def main() -> int:
    """Run the benchmark."""
    parser = common_arguments(__doc__, runs=5)
    parser.add_argument("--adapters", type=int, default=1000, help="default 1000")
    arguments = parser.parse_args()
    count = max(1, round(arguments.adapters * arguments.scale))
    with work_folder(arguments) as folder:
        make_adapters(folder / "adapters", count)
        timings = measure(commands(folder / "adapters"), arguments.runs)
    title = f"inspect, {count} adapters of {LAYERS * len(ATTENTION)} modules"
    print_report(title, timings, figures(timings, count), as_json=arguments.json)
    return 0


def make_adapters(folder: Path, count: int) -> None:
    """Write PEFT adapters whose data are holes: only headers are read."""
    specs = [
        TensorSpec(f"base_model.model.{module_name(layer, name)}.{factor}.weight", "F16", shape)
        for layer in range(LAYERS)
        for name in ATTENTION
        for factor, shape in (("lora_A", (RANK, HIDDEN)), ("lora_B", (HIDDEN, RANK)))
    ]
    header = format_header(canonical_order(specs), {"format": "pt"})
    size = len(header) + sum(spec.nbytes for spec in specs)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(ATTENTION),
    }
    for number in range(count):
        adapter = folder / f"adapter-{number:04}"
        adapter.mkdir(parents=True)
        with (adapter / "adapter_model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(size)
        (adapter / "adapter_config.json").write_text(json.dumps(config))


def commands(folder: Path) -> list[Command]:
    """Return the rows: an interpreter that does nothing, and the forms of the command."""
    inspect = [*loratool_command(), "inspect", folder]
    return [
        Command("python -c pass", [PYTHON, "-c", "pass"]),
        Command("inspect", inspect),
        Command("inspect --csv", [*inspect, "--csv"]),
        Command("inspect --jsonl", [*inspect, "--jsonl"]),
        Command("validate", [*loratool_command(), "validate", folder]),
    ]


def figures(timings: list[Timing], count: int) -> list[Figure]:
    """Return what each form takes, in all and for each adapter, and its peak memory."""
    limits = {"inspect": f"at most {5 * count / 1000:g}"}
    found: list[Figure] = []
    for timing in timings[1:]:
        limit = limits.get(timing.name, "")
        least = f"least {min(timing.walls):.2f}"
        found.append(Figure(timing.name, timing.wall, "s", limit, least))
        found.append(Figure(f"{timing.name}, peak", timing.peak / 1e6, "MB", ""))
    return found


if __name__ == "__main__":
    sys.exit(main())
