"""How long, and with how much memory, files below a megabyte keep a command: whole processes.

    python benchmarks/bench_hostile.py

Each file is as large as it may be and made to cost as much as it can: deep or wide headers,
patterns, pickles of nested values, archives of many records. Printed are the seconds and megabytes
of ``inspect`` and ``validate --deep``, the worst last.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from harness import (
    Command,
    common_arguments,
    loratool_command,
    measure,
    print_report,
    work_folder,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from hostile import dictionary, laughs, text, zipped

MOST: Final = 1 << 20
MODULE: Final = "base_model.model.model.layers.{}.q_proj.lora_{}.weight"


def header(value: object, data: int = 0) -> bytes:
    """Return a safetensors file of this header."""
    written = json.dumps(value, separators=(",", ":")).encode()
    return struct.pack("<Q", len(written)) + written + bytes(data)


def tensors(names: Iterator[str]) -> bytes:
    """Return a file of as many empty tensors as there is room for."""
    found: dict[str, object] = {}
    size = 16
    for name in names:
        size += len(name) + 50
        if size > MOST:
            break
        found[name] = {"dtype": "F32", "shape": [0, 1], "data_offsets": [0, 0]}
    return header(found)


def adapter(folder: Path, **fields: object) -> None:
    """Write an adapter of many modules, and a configuration with ``fields``."""
    names = [MODULE.format(i, side) for i in range(3000) for side in "AB"]
    shapes = {"A": [1, 1], "B": [1, 1]}
    entries = {
        name: {"dtype": "F32", "shape": shapes[name[-8]], "data_offsets": [4 * i, 4 * i + 4]}
        for i, name in enumerate(names)
    }
    (folder / "adapter_model.safetensors").write_bytes(header(entries, 4 * len(names)))
    config = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def archive(entries: int) -> bytes:
    """Return an archive of many small arrays."""
    file, array = io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros(0, "f4"))
    with zipfile.ZipFile(file, "w") as written:
        for number in range(entries):
            written.writestr(f"{number}.lora_a.npy", array.getvalue())
    return file.getvalue()


def gguf(keys: int) -> bytes:
    """Return a header of many key values."""
    pairs = b"".join(
        struct.pack("<Q", 6) + f"k{n:05}".encode() + struct.pack("<II", 4, n) for n in range(keys)
    )
    return b"GGUF" + struct.pack("<IQQ", 3, 0, keys) + pairs


CASES: dict[str, Callable[[Path], object]] = {
    "many tensors.safetensors": lambda p: p.write_bytes(tensors(f"{i:x}" for i in range(MOST))),
    "many modules.safetensors": lambda p: p.write_bytes(
        tensors(MODULE.format(i // 2, "AB"[i % 2]) for i in range(MOST))
    ),
    "deep header.safetensors": lambda p: p.write_bytes(
        struct.pack("<Q", 500_000) + b"[" * 250_000 + b"]" * 250_000
    ),
    "long name.safetensors": lambda p: p.write_bytes(tensors(iter(["a." * 450_000]))),
    "metadata.safetensors": lambda p: p.write_bytes(
        header({"__metadata__": {f"ss_{i}": "[" * 20 for i in range(20_000)}})
    ),
    "nested values.pt": lambda p: zipped(p, laughs(5000)),
    "many keys.pt": lambda p: zipped(
        p, dictionary(*(text(f"{i}.lora_A") + text("x") for i in range(40_000)))
    ),
    "many arrays.npz": lambda p: p.write_bytes(archive(4000)),
    "many key values.gguf": lambda p: p.write_bytes(gguf(40_000)),
    "optional parts": lambda p: adapter(p, rank_pattern={"a?" * 400 + "a" * 400: 4}),
    "counted parts": lambda p: adapter(
        p, rank_pattern={f"(a{{1,20}}){{40}}{i}": 4 for i in range(300)}
    ),
    "many patterns": lambda p: adapter(p, alpha_pattern={f".*{i}.*[xy]": 4 for i in range(10_000)}),
    "many targets": lambda p: adapter(p, target_modules=[f"m{i}" for i in range(60_000)]),
}


def main() -> None:
    """Measure every case with each command."""
    arguments = common_arguments(__doc__, runs=1).parse_args()
    commands = []
    with work_folder(arguments) as folder:
        for name, make in CASES.items():
            path = folder / name
            if not path.suffix:
                path.mkdir()
            make(path)
            for verb in (["inspect"], ["validate", "--deep"]):
                argv = [*loratool_command(), *verb, path]
                commands.append(Command(f"{verb[0]}, {name}", argv, may_refuse=True))
        timings = measure(commands, arguments.runs, warm_up=False)
    timings.sort(key=lambda timing: timing.wall)
    print_report("hostile", timings, [], as_json=arguments.json)


if __name__ == "__main__":
    main()
