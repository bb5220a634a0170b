"""Every verb as a whole process, start-up included; with --against, two checkouts in turn."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from harness import (
    ALL_LINEAR,
    ATTENTION,
    PLACES,
    PYTHON,
    WIDTHS,
    Command,
    Figure,
    LlamaShape,
    Timing,
    common_arguments,
    make_adapter,
    make_base,
    measure,
    print_report,
    read_through,
    sizes_of,
    work_folder,
)
from safetensors.numpy import save_file

from loratool.files.safetensors import format_header
from loratool.files.spec import TensorSpec

HERE: Final = Path(__file__).resolve().parent.parent
GIGABYTE: Final = LlamaShape(layers=10, hidden=2048, intermediate=5632, kv=256, vocabulary=32000)
DEEP: Final = LlamaShape(layers=4, hidden=2048, intermediate=5632, kv=256, vocabulary=64)
SQUARE: Final = LlamaShape(layers=8, hidden=4096, intermediate=64, kv=64, vocabulary=64)
ONE: Final = LlamaShape(layers=1, hidden=64, intermediate=64, kv=64, vocabulary=64)
SHARDS: Final = 1000
TENSORS: Final = 60


def main() -> int:
    """Run the benchmark."""
    parser = common_arguments(__doc__, runs=15)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    parser.add_argument("--only", nargs="*", default=[], help="words in the names of the rows")
    arguments = parser.parse_args()
    with work_folder(arguments) as folder:
        rows = [
            (name, words, output)
            for name, words, output in work(folder)
            if not arguments.only or any(word in name for word in arguments.only)
        ]
        commands = list(run(rows, arguments.against, folder))
        timings = measure(commands, arguments.runs)
    print_report("whole processes", timings, list(figures(timings, rows)), as_json=arguments.json)
    return 0


Row = tuple[str, Sequence[str | Path], Path | None]


def work(folder: Path) -> Iterator[Row]:
    """Make the inputs, and yield what is measured: a name, arguments of loratool, an output."""
    out = folder / "out"
    base = make_base(folder / "base", GIGABYTE)
    linear = make_adapter(folder / "linear", GIGABYTE, ALL_LINEAR)
    qv = make_adapter(folder / "qv", GIGABYTE, ("q_proj", "v_proj"))
    read_through(base)
    yield "merge, all linear", ("merge", base, linear, "-o", out), out
    yield "merge, q and v", ("merge", base, qv, "-o", out), out
    wide = make_adapter(folder / "wide", SQUARE, ("q_proj",), rank=64)
    yield "truncate 64 to 16, 8 x 4096", ("truncate", wide, "--rank", "16", "-o", out), out
    four = [make_adapter(folder / f"four-{i}", DEEP, ALL_LINEAR) for i in range(4)]
    yield "compose 4 x r 16", ("compose", *four, "--rank", "16", "-o", out), out
    yield "rescale", ("rescale", four[0], "--scale", "0.3", "-o", out), out
    yield "compare", ("compare", four[0], four[1], "--json"), None
    yield "inspect --spectrum", ("inspect", four[0], "--spectrum", "--json"), None
    yield "inspect, 1,000 tensors", ("inspect", many(folder / "many"), "--json"), None
    one = make_adapter(folder / "one", ONE, ("q_proj",), rank=4)
    yield "start-up: rescale", ("rescale", one, "--scale", "0.3", "-o", out), out
    yield "start-up: compare", ("compare", one, one, "--json"), None
    yield "start-up: inspect --spectrum", ("inspect", one, "--spectrum", "--json"), None
    unet = kohya_unet(folder / "unet.safetensors")
    tiny = kohya_unet(folder / "tiny.safetensors", blocks=1)
    file = folder / "out.safetensors"
    for name, source in (("U-Net", unet), ("start-up", tiny)):
        yield f"truncate kohya {name}", ("truncate", source, "--rank", "4", "-o", file), file
        words = ("compose", source, "--rank", "4", "--to", "kohya", "-o", file)
        yield f"compose kohya {name}", words, file
    sparse, touched = sparse_model(folder / "sparse"), folder / "touched"
    sparse_adapter(touched)
    yield (
        "merge --dry-run, 60,000 tensors",
        ("merge", sparse, touched, "-o", out, "--dry-run", "--json"),
        None,
    )


def run(rows: Sequence[Row], against: Path | None, folder: Path) -> Iterator[Command]:
    """Yield the commands: each row here, and in the other checkout."""
    yield Command("python -c pass", [PYTHON, "-c", "pass"])
    yield Command(
        "cp -r of the base", ["cp", "-r", folder / "base", folder / "copy"], folder / "copy"
    )
    for name, words, output in rows:
        for label, tree in (("", HERE), (" (before)", against)):
            if tree is not None:
                environment = ["env", f"PYTHONPATH={tree}", PYTHON, "-P", "-m", "loratool"]
                yield Command(f"{name}{label}", [*environment, *words], output)


def figures(timings: Sequence[Timing], rows: Sequence[Row]) -> Iterator[Figure]:
    """Yield ratios and what is left without start-up."""
    found = {timing.name: timing for timing in timings}
    start, copy = found["python -c pass"].wall, found["cp -r of the base"].wall
    for name, _, _ in rows:
        now, before = found[name], found.get(f"{name} (before)")
        low, high = np.quantile(now.walls, [0.25, 0.75])
        note = f"quartiles {low:.3f} to {high:.3f} s, {now.peak / 1e6:.0f} MB"
        if before is not None:
            note += f"; before {before.wall:.3f} s, {before.peak / 1e6:.0f} MB"
        yield Figure(f"{name}: over python -c pass", now.wall - start, "s", "", note)
    if "merge, all linear" in found:
        limit = 1.3 * copy + 0.25
        yield Figure(
            "merge / (1.3 cp + 0.25 s)", found["merge, all linear"].wall / limit, "", "<= 1"
        )
    for verb in ("truncate", "compose"):
        if f"{verb} kohya U-Net" in found:
            rest = found[f"{verb} kohya U-Net"].wall - found[f"{verb} kohya start-up"].wall
            yield Figure(f"{verb} of the U-Net without start-up", rest, "s", "<= 0.16 s")


def many(folder: Path) -> Path:
    """Write a PEFT adapter of 500 modules."""
    shape = LlamaShape(layers=125, hidden=64, intermediate=64, kv=64, vocabulary=64)
    return make_adapter(folder, shape, ATTENTION, rank=4)


def kohya_unet(path: Path, *, blocks: int = len(PLACES)) -> Path:
    """Write an adapter of the attention of Stable Diffusion 1.5's U-Net: 9 modules a block."""
    generator = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for place, width in list(zip(PLACES, WIDTHS, strict=True))[:blocks]:
        for leaf, (out, into) in sizes_of(width).items():
            key = f"lora_unet_{place}.transformer_blocks.0.{leaf}".replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = generator.standard_normal((8, into), np.float32)
            tensors[f"{key}.lora_up.weight"] = generator.standard_normal((out, 8), np.float32)
            tensors[f"{key}.alpha"] = np.array(8, np.float32)
    save_file(tensors, path)
    return path


def sparse_model(folder: Path) -> Path:
    """Write a model of 1,000 sparse shards with 60 tensors each, and its index."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        specs = []
        for index in range(TENSORS):
            module = (
                f"model.layers.{shard}.block.{index // 3}.{('q_proj', 'k_proj', 'norm')[index % 3]}"
            )
            size = (64,) if index % 3 == 2 else (64, 64)
            specs.append(TensorSpec(f"{module}.weight", "BF16", size))
            weight_map[f"{module}.weight"] = name
        header = format_header(specs, {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.nbytes for spec in specs))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def sparse_adapter(folder: Path) -> None:
    """Write an adapter on 3,000 modules of that model."""
    folder.mkdir()
    tensors: dict[str, np.ndarray] = {}
    for shard in range(SHARDS):
        for index in range(3):
            key = f"base_model.model.model.layers.{shard}.block.{index}.q_proj"
            tensors[f"{key}.lora_A.weight"] = np.ones((2, 64), np.float32)
            tensors[f"{key}.lora_B.weight"] = np.ones((64, 2), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    sys.exit(main())
