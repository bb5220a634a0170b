"""How long ``merge`` into a quantised base takes against reading it and writing the result.

Two bases with TinyLlama's layers, repeated until the weights take 1 GB in NF4 (nested) and 2 GB in
FP8 with blocks of 128 × 128. The limit is a process that reads the base once and writes as many
bytes as the result has. Then how fast each codec decodes one weight on one thread, in turn with
the library that the format comes from.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from harness import (
    ALL_LINEAR,
    PYTHON,
    TINY_LLAMA,
    Command,
    Figure,
    LlamaShape,
    Timing,
    clear,
    common_arguments,
    loratool_command,
    make_adapter,
    measure,
    print_report,
    read_through,
    say,
    work_folder,
)

from loratool.base.model import open_model
from loratool.codecs.codec import CodedTensor
from loratool.codecs.weights import rows_of
from loratool.files.inputs import InputFiles
from loratool.files.safetensors import format_header
from loratool.files.spec import TensorSpec

LAYERS: Final = 45
"""With TinyLlama's 44 million weights in a layer: 1 GB in 4 bits, 2 GB in 8."""
SHARD: Final = 500_000_000
BLOCK: Final = 128
NESTED: Final = 256
CHUNK: Final = 8 << 20
READ_AND_WRITE: Final = f"""
import os, sys
base, output, total = sys.argv[1], sys.argv[2], int(sys.argv[3])
names = sorted(name for name in os.listdir(base) if name.endswith(".safetensors"))
sizes = [os.path.getsize(os.path.join(base, name)) for name in names]
os.mkdir(output)
buffer = memoryview(bytearray({CHUNK}))
for name, size in zip(names, sizes):
    wanted, written, read = total * size // sum(sizes), 0, 0
    with open(os.path.join(base, name), "rb", buffering=0) as source:
        with open(os.path.join(output, name), "wb", buffering=0) as target:
            while count := source.readinto(buffer):
                read += count
                while written < wanted * read // size:
                    written += target.write(buffer[:min({CHUNK}, wanted * read // size - written)])
"""


@dataclass(frozen=True)
class Kind:
    """One way to store the linear layers.

    Attributes:
        name: What the table calls it.
        tensors: Yields what a weight of some shape is stored in: the end of a name, dtype, shape.
        config: What the configuration says of it.
        keeps: Whether it can be written again.
    """

    name: str
    tensors: Callable[[tuple[int, int]], Iterator[tuple[str, str, tuple[int, ...]]]]
    config: dict[str, Any]
    keeps: bool


def nf4(shape: tuple[int, int]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield the tensors of a weight in NF4, its scales quantised too."""
    count = shape[0] * shape[1]
    blocks = -(-count // 64)
    yield "weight", "U8", (count // 2, 1)
    yield "weight.absmax", "U8", (blocks,)
    yield "weight.nested_absmax", "F32", (-(-blocks // NESTED),)
    yield "weight.nested_quant_map", "F32", (256,)
    yield "weight.quant_map", "F32", (16,)
    yield "weight.quant_state.bitsandbytes__nf4", "U8", (len(_state(shape)),)


def fp8(shape: tuple[int, int]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield the tensors of a weight in FP8 with a scale for each block."""
    yield "weight", "F8_E4M3", shape
    yield "weight_scale_inv", "F32", (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))


KINDS: Final = (
    Kind(
        "NF4",
        nf4,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        keeps=False,
    ),
    Kind(
        "block FP8",
        fp8,
        {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
        keeps=True,
    ),
)


def _state(shape: tuple[int, int]) -> bytes:
    return json.dumps(
        {
            "quant_type": "nf4",
            "blocksize": 64,
            "dtype": "bfloat16",
            "shape": list(shape),
            "nested_blocksize": NESTED,
            "nested_dtype": "float32",
            "nested_offset": 0.05,
        }
    ).encode()


def main() -> int:
    """Run the benchmark."""
    arguments = parse_arguments()
    shape = replace(TINY_LLAMA, layers=LAYERS, vocabulary=32000).scaled(arguments.scale)
    timings: list[Timing] = []
    figures: list[Figure] = []
    with work_folder(arguments) as folder:
        adapter = make_adapter(folder / "adapter", shape, ALL_LINEAR)
        for kind in KINDS:
            say(f"making a base in {kind.name}")
            base = make_base(folder / "base", shape, kind)
            read_through(base)
            mine = measure(list(commands(kind, base, adapter, shape, folder)), arguments.runs)
            timings += mine
            figures += ratios(kind, base, mine)
            shutil.rmtree(base)
            clear(None)
        figures += decoding(folder, arguments.runs)
    print_report("merge into a quantised base", timings, figures, as_json=arguments.json)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    return common_arguments(__doc__, runs=3).parse_args()


def make_base(folder: Path, shape: LlamaShape, kind: Kind) -> Path:
    """Write a sharded base whose linear layers are random codes."""
    folder.mkdir(parents=True)
    random = np.random.Generator(np.random.SFC64(0))
    shards: list[list[tuple[TensorSpec, tuple[int, ...]]]] = [[]]
    for spec in shape.tensors():
        is_coded = any(f".{name}." in spec.name for name in ALL_LINEAR)
        parts = [("weight", spec.dtype, spec.shape)]
        if is_coded:
            parts = list(kind.tensors((spec.shape[0], spec.shape[1])))
        specs = [
            (TensorSpec(spec.name.removesuffix("weight") + end, dtype, size), spec.shape)
            for end, dtype, size in parts
        ]
        if shards[-1] and sum(s.nbytes for s, _ in (*shards[-1], *specs)) > SHARD:
            shards.append([])
        shards[-1] += specs
    places = {}
    for number, specs in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(format_header([spec for spec, _ in specs], {"format": "pt"}))
            for spec, whole in specs:
                file.write(memoryview(content(spec, whole, random)).cast("B"))
        places.update((spec.name, name) for spec, _ in specs)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {**shape.config(), "quantization_config": kind.config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def content(
    spec: TensorSpec, whole: tuple[int, ...], random: np.random.Generator
) -> np.ndarray | bytes:
    """Return the data of one tensor: codes of any value, scales that make weights of 0.02."""
    if spec.name.endswith("__nf4"):
        return _state((whole[0], whole[1]))
    if spec.dtype == "F32":
        return (random.random(spec.elements, dtype=np.float32) * 1e-2 + 1e-3).astype("<f4")
    data = np.frombuffer(random.bytes(spec.nbytes), np.uint8)
    if spec.dtype == "F8_E4M3":
        data = data & 0xBF  # below 2, and no NaN
    elif spec.dtype == "BF16":
        data = (data.view("<u2") & 0x807F) | 0x3C00
    return data


def commands(
    kind: Kind, base: Path, adapter: Path, shape: LlamaShape, folder: Path
) -> Iterator[Command]:
    """Yield the rows of the table for one base."""
    output = folder / "output"
    expanded = sum(spec.nbytes for spec in shape.tensors())
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    merge = [*loratool_command(), "merge", base, adapter, "-o", output]
    limit = [PYTHON, "-I", "-S", "-c", READ_AND_WRITE, base, output]
    yield Command(f"read {kind.name}, write bf16", [*limit, str(expanded)], output)
    yield Command(f"merge, {kind.name}", merge, output)
    if kind.keeps:
        yield Command(f"read and write {kind.name}", [*limit, str(size)], output)
        yield Command(f"merge, {kind.name} kept", [*merge, "--quantized", "keep"], output)


def ratios(kind: Kind, base: Path, timings: list[Timing]) -> Iterator[Figure]:
    """Yield wall times of whole processes by those of their limits, and the peaks."""
    size = sum(path.stat().st_size for path in base.glob("*.safetensors")) / 1e9
    expanded, merge, *kept = timings
    pairs = [(merge, expanded, "at most 2.5")]
    if kept:
        alike, keep = kept
        pairs += [(keep, expanded, "at most 2.5"), (keep, alike, "")]
    for one, limit, target in pairs:
        each = [wall / floor for wall, floor in zip(one.walls, limit.walls, strict=True)]
        note = f"base of {size:.2f} GB; rounds {min(each):.2f} to {max(each):.2f}"
        yield Figure(f"{one.name} / {limit.name}", one.wall / limit.wall, "", target, note)
    for one in (merge, *kept[1:]):
        yield Figure(f"{one.name}: peak", one.peak / 1e6, "MB", "at most 250")


# ------------------------------------------------------------------------------------- decoding


def decoding(folder: Path, runs: int) -> Iterator[Figure]:
    """Yield how many GB/s of float32 each codec makes on one thread, and its library makes."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from decoders import CASES

    torch.set_num_threads(1)
    for case in CASES:
        say(f"decoding {case.name}")
        model, library = case.make(folder / "one")
        (coded,) = (w for w in open_model(model).tensors.values() if isinstance(w, CodedTensor))
        files = InputFiles({})
        reader = rows_of(coded, coded.width, files)
        block = max(1, (1 << 19) // coded.width)

        def ours(reader: Any = reader, coded: CodedTensor = coded, block: int = block) -> None:
            for start in range(0, coded.rows, block):
                reader.values(start, min(block, coded.rows - start), is_double=False)

        mine, theirs = [], []
        for _ in range(runs + 1):
            for function, into in ((ours, mine), (library, theirs)):
                begin = time.perf_counter()
                function()
                into.append(time.perf_counter() - begin)
        files.close()
        speeds = [4 * coded.spec.elements / 1e9 / min(each[1:]) for each in (mine, theirs)]
        note = f"{case.library}: {speeds[1]:.2f} GB/s"
        yield Figure(f"decode {case.name}", speeds[0], "GB/s", "", note)
        shutil.rmtree(folder / "one")


if __name__ == "__main__":
    sys.exit(main())
