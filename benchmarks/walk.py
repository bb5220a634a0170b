"""How far one run of a verb walks through the package: functions, modules, switches, calls.

Each verb runs twice in one process on two modules of a Llama-like model; the second run is
counted, with ``sys.setprofile`` in every thread, frames of loratool only. A switch is a call in
another module than the call before it. Threads make the figures differ by a few from run to run.

    python benchmarks/walk.py [--json] [VERB ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file

import loratool

PACKAGE: Final = str(Path(loratool.__file__).parent) + "/"
MODULES: Final = {
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.0.mlp.down_proj": (32, 48),
}
RANK: Final = 4


@dataclass
class Walk:
    """What was entered.

    Attributes:
        functions: Every function, as its module and its qualified name.
        calls: How often one was entered; comprehensions and generators that go on count too.
        switches: How often that was in another module than the call before.
    """

    functions: set[tuple[str, str]] = field(default_factory=set)
    calls: int = 0
    switches: int = 0
    _last: str = ""

    @property
    def modules(self) -> set[str]:
        return {module for module, _ in self.functions}

    def as_json(self) -> dict[str, int]:
        return {
            "functions": len(self.functions),
            "modules": len(self.modules),
            "switches": self.switches,
            "calls": self.calls,
        }

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        self.functions.add((code.co_filename, code.co_qualname))
        self.calls += 1
        if code.co_filename != self._last:
            self.switches += 1
            self._last = code.co_filename


def walk(run: Callable[[], object]) -> Walk:
    """Return what ``run`` enters, in all threads that it starts."""
    found = Walk()
    threading.setprofile(found)
    sys.setprofile(found)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return found


def make_inputs(folder: Path) -> None:
    """Write a model, a finetuned one, and two adapters."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return random.standard_normal(shape, dtype=np.float32)

    weights = {f"{name}.weight": draw(*shape) for name, shape in MODULES.items()}
    tuned = {key: value + 0.1 * draw(*value.shape) for key, value in weights.items()}
    for name, tensors in (("base", weights), ("tuned", tuned)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
    for name in ("one", "two"):
        factors = {}
        for module, (out, into) in MODULES.items():
            factors[f"base_model.model.{module}.lora_A.weight"] = draw(RANK, into)
            factors[f"base_model.model.{module}.lora_B.weight"] = draw(out, RANK)
        (folder / name).mkdir()
        save_file(factors, folder / name / "adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8}
        config["target_modules"] = ["q_proj", "down_proj"]
        (folder / name / "adapter_config.json").write_text(json.dumps(config))


def verbs(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Return every verb as a function of its output."""
    base, tuned, one, two = (folder / name for name in ("base", "tuned", "one", "two"))
    return {
        "inspect": lambda out: loratool.inspect(one),
        "merge": lambda out: loratool.merge(base, [one], out),
        "convert -> kohya": lambda out: loratool.convert(
            one, "kohya", out.with_suffix(".safetensors")
        ),
        "truncate": lambda out: loratool.truncate(one, out, rank=2),
        "compose --rank --to kohya": lambda out: loratool.compose(
            [one], out.with_suffix(".safetensors"), rank=2, to="kohya"
        ),
        "extract": lambda out: loratool.extract(base, tuned, out, rank=2),
        "extract --to kohya": lambda out: loratool.extract(
            base, tuned, out.with_suffix(".safetensors"), rank=2, to="kohya"
        ),
        "rescale": lambda out: loratool.rescale(one, out, scale=0.5),
        "compare": lambda out: loratool.compare([one, two]),
    }


def measure(wanted: list[str]) -> dict[str, Walk]:
    """Run each verb twice, and return the walk of the second run."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        for number, (verb, run) in enumerate(verbs(folder).items()):
            if wanted and verb not in wanted:
                continue
            run(folder / f"first-{number}")
            found[verb] = walk(lambda run=run, number=number: run(folder / f"second-{number}"))
    return found


def main() -> None:
    """Print a table, or a document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("verbs", nargs="*", metavar="VERB")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {verb: walk.as_json() for verb, walk in measure(arguments.verbs).items()}
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    print("| verb | functions | modules | module switches | calls |")
    print("|---|---|---|---|---|")
    for verb, row in found.items():
        print(f"| {verb} | {' | '.join(str(value) for value in row.values())} |")


if __name__ == "__main__":
    main()
