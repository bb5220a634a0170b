"""``loratool compose`` of four adapters at one rank against PEFT's svd combination of them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Final

import torch
from harness import (
    ALL_LINEAR,
    PYTHON,
    RANK,
    TINY_LLAMA,
    Command,
    Figure,
    common_arguments,
    loratool_command,
    make_adapter,
    measure,
    print_report,
    work_folder,
)
from safetensors.torch import load_file

WEIGHTS: Final = (0.7, -0.4, 1.0, 0.25)

PEFT: Final = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from safetensors import safe_open
from torch import nn

output, weights, *adapters = sys.argv[1:]
root = nn.Module()
root.prepare_inputs_for_generation = None  # what the task type of the adapters asks for
with safe_open(Path(adapters[0]) / "adapter_model.safetensors", "pt") as file:
    shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
for key, (out, _) in shapes.items():
    if not key.endswith(".lora_B.weight"):
        continue
    path = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
    into = shapes[key.replace("lora_B", "lora_A")][1]
    parent = root
    *parts, leaf = path.split(".")
    for part in parts:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    parent.add_module(leaf, nn.Linear(into, out, bias=False))
model = PeftModel.from_pretrained(root, adapters[0], adapter_name="a0")
for index, adapter in enumerate(adapters[1:], start=1):
    model.load_adapter(adapter, f"a{index}")
names = [f"a{index}" for index in range(len(adapters))]
model.add_weighted_adapter(
    names, [float(w) for w in weights.split(",")], "sum", "svd", svd_rank=RANK
)
model.save_pretrained(output, selected_adapters=["sum"])
"""


def main() -> int:
    """Run the benchmark."""
    parser = common_arguments(__doc__, runs=3)
    parser.add_argument("--layers", type=int, default=1, help="of the adapters; default 1")
    arguments = parser.parse_args()
    shape = TINY_LLAMA.scaled(arguments.scale)
    shape = type(shape)(
        arguments.layers, shape.hidden, shape.intermediate, shape.kv, shape.vocabulary
    )
    with work_folder(arguments) as folder:
        adapters = [
            make_adapter(folder / f"adapter-{seed}", shape, ALL_LINEAR, seed=seed)
            for seed in range(1, len(WEIGHTS) + 1)
        ]
        commands = both(folder, adapters)
        timings = measure(commands, arguments.runs, warm_up=False)
        errors = quality(folder, adapters, commands)
    count = len(ALL_LINEAR) * arguments.layers
    figures = [
        Figure("PEFT / loratool, wall time", timings[1].wall / timings[0].wall, "x"),
        Figure("PEFT / loratool, peak memory", timings[1].peak / timings[0].peak, "x"),
        Figure("loratool, error / optimum - 1", errors[0] - 1, "", "<= 0.0001"),
        Figure("PEFT, error / optimum - 1", errors[1] - 1),
    ]
    print_report(
        f"compose 4 x rank {RANK} to {RANK}, {count} modules of TinyLlama's sizes",
        timings,
        figures,
        as_json=arguments.json,
    )
    return 0


def both(folder: Path, adapters: list[Path]) -> list[Command]:
    """Return the two commands."""
    script = folder / "peft_svd.py"
    script.write_text(PEFT.replace("svd_rank=RANK", f"svd_rank={RANK}"))
    weights = [part for weight in WEIGHTS for part in ("-w", str(weight))]
    ours = [*loratool_command(), "compose", *adapters, *weights, "--rank", str(RANK)]
    words = ",".join(map(str, WEIGHTS))
    return [
        Command("loratool compose", [*ours, "-o", folder / "ours"], folder / "ours"),
        Command(
            "PEFT add_weighted_adapter, svd",
            [PYTHON, script, folder / "theirs", words, *adapters],
            folder / "theirs",
        ),
    ]


def quality(folder: Path, adapters: list[Path], commands: list[Command]) -> list[float]:
    """Run both once more and return the error of each over the optimum, over all modules."""
    import subprocess

    for command in commands:
        subprocess.run([str(part) for part in command.argv], check=True, capture_output=True)
    inputs = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]
    scales = [alpha_over_rank(adapter) for adapter in adapters]
    results = [folder / "ours", folder / "theirs" / "sum"]
    outputs = [load_file(result / "adapter_model.safetensors") for result in results]
    lost, optimum = [0.0, 0.0], 0.0
    for key in (key for key in inputs[0] if key.endswith("lora_A.weight")):
        partner = key.replace("lora_A", "lora_B")
        exact = sum(
            weight * scale * (tensors[partner].double() @ tensors[key].double())
            for weight, scale, tensors in zip(WEIGHTS, scales, inputs, strict=True)
        )
        assert isinstance(exact, torch.Tensor)
        small = exact @ exact.mT if exact.shape[0] <= exact.shape[1] else exact.mT @ exact
        squares = torch.linalg.eigvalsh(small).flip(0)
        optimum += float(squares[RANK : len(WEIGHTS) * RANK].sum())
        for index, (result, tensors) in enumerate(zip(results, outputs, strict=True)):
            made = alpha_over_rank(result) * (tensors[partner].double() @ tensors[key].double())
            lost[index] += float((made - exact).square().sum())
    return [math.sqrt(value / optimum) for value in lost]


def alpha_over_rank(adapter: Path) -> float:
    """Return the one scale of an adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    return float(config["lora_alpha"] / config["r"])


if __name__ == "__main__":
    sys.exit(main())
