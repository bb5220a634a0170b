"""What the benchmarks share: children that are timed side by side, and models to feed them.

Commands run interleaved (A B C A B C …), so that a busy machine slows all of them alike. Between
two runs the output is deleted and the disk is synced, both untimed, so that no run pays for what
another has left to write.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from loratool.files.safetensors import canonical_order, format_header
from loratool.files.spec import TensorSpec

__all__ = [
    "ALL_LINEAR",
    "ALPHA",
    "ATTENTION",
    "PYTHON",
    "RANK",
    "TINY_LLAMA",
    "Command",
    "Figure",
    "LlamaShape",
    "Timing",
    "clear",
    "common_arguments",
    "loratool_command",
    "machine",
    "make_adapter",
    "make_base",
    "measure",
    "module_name",
    "print_report",
    "read_through",
    "say",
    "work_folder",
]

PYTHON: Final = sys.executable
RANK: Final = 16
ALPHA: Final = 32
SHARD_BYTES: Final = 500_000_000
PIECE: Final = 1 << 22
WIDTH: Final = 110
"""Columns of the tables where there is no terminal."""
ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR: Final = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

LAUNCHER: Final = """
import os, sys, time
quiet = [
    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
]
begin = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
_, status, usage = os.wait4(child, 0)
wall = time.perf_counter() - begin
cpu = usage.ru_utime + usage.ru_stime
print(wall, cpu, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status))
"""
"""Starts and reaps the child. Linux counts the parent's memory at the time of ``exec`` into the
child's ``ru_maxrss``, so the parent has to be small: this one, of about 10 MB, and not the
benchmark itself. What takes less than that reads as that."""


# ---------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Command:
    """One row of a benchmark.

    Attributes:
        name: What the table calls it.
        argv: The program and its arguments; no shell.
        output: What it writes, deleted after every run.
        at_most: Upper limit of the number of runs, for slow ones.
        may_refuse: Whether it may end with another exit status than 0.
    """

    name: str
    argv: Sequence[str | Path]
    output: Path | None = None
    at_most: int | None = None
    may_refuse: bool = False


@dataclass
class Timing:
    """What the runs of one command took.

    Attributes:
        name: Of the command.
        walls: Seconds of each run.
        cpus: Seconds of user and system time of each run.
        peaks: Largest resident memory of each run, in bytes.
    """

    name: str
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def wall(self) -> float:
        """The median of the wall times."""
        return statistics.median(self.walls)

    @property
    def cpu(self) -> float:
        """The median of the processor times."""
        return statistics.median(self.cpus)

    @property
    def peak(self) -> int:
        """The largest of the peaks."""
        return max(self.peaks)


def measure(commands: Sequence[Command], runs: int, *, warm_up: bool = True) -> list[Timing]:
    """Run all commands in turn, ``runs`` times, and return what they took.

    With ``warm_up`` an untimed round comes first, in which slow commands sit out.
    """
    timings = [Timing(command.name) for command in commands]
    if warm_up:
        for command in commands:
            if command.at_most is None:
                say(f"warm-up: {command.name}")
                _run_once(command)
    for number in range(runs):
        for command, timing in zip(commands, timings, strict=True):
            if command.at_most is not None and number >= command.at_most:
                continue
            wall, cpu, peak = _run_once(command)
            timing.walls.append(wall)
            timing.cpus.append(cpu)
            timing.peaks.append(peak)
            say(f"run {number + 1} of {runs}: {command.name}: {wall:.3f} s")
    return timings


def _run_once(command: Command) -> tuple[float, float, int]:
    """Run a command in a child of a small launcher; return wall s, processor s, peak bytes."""
    program = shutil.which(command.argv[0])
    if program is None:
        raise SystemExit(f"{command.argv[0]}: no such program")
    done = subprocess.run(
        [PYTHON, "-I", "-S", "-c", LAUNCHER, program, *map(str, command.argv[1:])],
        capture_output=True,
        text=True,
    )
    clear(command.output)
    if done.returncode:
        raise SystemExit(f"{command.name}: {done.stderr}")
    wall, cpu, peak, status = done.stdout.split()
    if status != "0" and not (command.may_refuse and status in ("1", "2")):
        raise SystemExit(f"{command.name}: exit status {status}\n{done.stderr}")
    return float(wall), float(cpu), int(peak)


def clear(path: Path | None) -> None:
    """Delete an output and wait until the disk has nothing left to write."""
    if path is not None and path.is_dir():
        shutil.rmtree(path)
    elif path is not None:
        path.unlink(missing_ok=True)
    os.sync()


def read_through(folder: Path) -> None:
    """Bring all files of a folder into the page cache, and leave nothing to be written."""
    os.sync()
    buffer = memoryview(bytearray(1 << 20))
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def loratool_command() -> list[str]:
    """Return how to start loratool with this interpreter: its script, or the module."""
    script = Path(PYTHON).with_name("loratool")
    return [str(script)] if script.exists() else [PYTHON, "-m", "loratool"]


# ------------------------------------------------------------------------------------- reporting


@dataclass(frozen=True)
class Figure:
    """A number that follows from the timings, and where it should be.

    Attributes:
        name: What it is.
        value: The number.
        unit: Shown after it.
        target: What the project wants it to be, in words; empty where there is no such thing.
        note: Where it comes from, such as the spread over the runs.
    """

    name: str
    value: float
    unit: str = ""
    target: str = ""
    note: str = ""


def print_report(
    benchmark: str, timings: Sequence[Timing], figures: Sequence[Figure], *, as_json: bool
) -> None:
    """Print the tables of a benchmark, or one JSON document with the runs in it."""
    if as_json:
        print(json.dumps(_document(benchmark, timings, figures), indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if timings:
        console.print(_timing_table(benchmark, timings))
    if figures:
        console.print(_figure_table(figures))


def say(text: str) -> None:
    """Print a line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def _timing_table(benchmark: str, timings: Sequence[Timing]) -> Table:
    table = Table(title=f"{benchmark}: medians of {max(len(t.walls) for t in timings)} runs")
    table.add_column("what")
    for name in ("wall s", "min s", "CPU s", "/ first", "peak MB"):
        table.add_column(name, justify="right")
    for timing in timings:
        table.add_row(
            timing.name,
            f"{timing.wall:.3f}",
            f"{min(timing.walls):.3f}",
            f"{timing.cpu:.3f}",
            f"{timing.wall / timings[0].wall:.2f}",
            f"{timing.peak / 1e6:.0f}",
        )
    return table


def _figure_table(figures: Sequence[Figure]) -> Table:
    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("target")
    table.add_column("note")
    for figure in figures:
        table.add_row(
            figure.name, f"{figure.value:.4g} {figure.unit}".rstrip(), figure.target, figure.note
        )
    return table


def machine() -> dict[str, Any]:
    """Return what the timings depend on."""
    return {
        "processors": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "loratool": version("loratool"),
    }


def _document(
    benchmark: str, timings: Sequence[Timing], figures: Sequence[Figure]
) -> dict[str, Any]:
    return {
        "schema": 1,
        "benchmark": benchmark,
        "machine": machine(),
        "rows": [
            {
                "name": timing.name,
                "median": timing.wall,
                "min": min(timing.walls),
                "ratio": timing.wall / timings[0].wall,
                "cpu": timing.cpu,
                "peak_bytes": timing.peak,
                "walls": timing.walls,
            }
            for timing in timings
        ],
        "figures": [vars(figure) for figure in figures],
    }


# ------------------------------------------------------------------------------------- arguments


def common_arguments(description: str | None, *, runs: int) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--runs", type=_positive, default=runs, help=f"default {runs}")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1 for a quick trial")
    parser.add_argument("--work-dir", type=Path, help="where the data goes; default: temporary")
    parser.add_argument("--keep", action="store_true", help="leave the data there")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


@contextmanager
def work_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """Give a fresh folder in ``--work-dir``, removed in the end unless ``--keep`` is given."""
    if arguments.work_dir is not None:
        arguments.work_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="loratool-benchmark-", dir=arguments.work_dir))
    try:
        yield folder
    finally:
        if arguments.keep:
            say(f"kept: {folder}")
        else:
            shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a LLaMA model; heads have 64 features.

    Attributes:
        layers: Number of decoder layers.
        hidden: Width of the model.
        intermediate: Width of the feed-forward layers.
        kv: Outputs of the key and value projections.
        vocabulary: Number of tokens.
    """

    layers: int
    hidden: int
    intermediate: int
    kv: int
    vocabulary: int

    def scaled(self, factor: float) -> LlamaShape:
        """All sizes times ``factor``, still sizes that a LLaMA can have."""
        if factor == 1:
            return self
        heads = max(1, round(self.hidden * factor / 64))
        wanted = max(1, round(self.kv * factor / 64))
        kv_heads = max(count for count in range(1, wanted + 1) if heads % count == 0)
        return LlamaShape(
            layers=max(1, round(self.layers * factor)),
            hidden=64 * heads,
            intermediate=64 * max(1, round(self.intermediate * factor / 64)),
            kv=64 * kv_heads,
            vocabulary=64 * max(1, round(self.vocabulary * factor / 64)),
        )

    def deeper(self, factor: int) -> LlamaShape:
        """The same with ``factor`` times as many layers."""
        return replace(self, layers=self.layers * factor)

    def linear(self, projection: str) -> tuple[int, int]:
        """Outputs and inputs of a projection."""
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.kv, self.hidden),
            "v_proj": (self.kv, self.hidden),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }[projection]

    def tensors(self) -> Iterator[TensorSpec]:
        """All tensors of the model, in the order of its layers."""
        yield _bf16("model.embed_tokens.weight", self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for projection in ALL_LINEAR:
                yield _bf16(module_name(layer, projection) + ".weight", *self.linear(projection))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield _bf16(f"model.layers.{layer}.{norm}.weight", self.hidden)
        yield _bf16("model.norm.weight", self.hidden)
        yield _bf16("lm_head.weight", self.vocabulary, self.hidden)

    def config(self) -> dict[str, Any]:
        """The contents of ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.kv // 64,
            "head_dim": 64,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


TINY_LLAMA: Final = LlamaShape(layers=22, hidden=2048, intermediate=5632, kv=256, vocabulary=32000)
"""TinyLlama's sizes: 1.1 B parameters."""


def module_name(layer: int, projection: str) -> str:
    """Return the dotted path of a projection, as transformers names it."""
    part = "self_attn" if projection in ATTENTION else "mlp"
    return f"model.layers.{layer}.{part}.{projection}"


def _bf16(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "BF16", shape)


def make_base(folder: Path, shape: LlamaShape, *, seed: int = 0) -> Path:
    """Write a sharded base with random weights, a piece at a time, and return its folder."""
    folder.mkdir(parents=True)
    shards = list(_shards(shape.tensors()))
    random = np.random.Generator(np.random.SFC64(seed))
    places: dict[str, str] = {}
    for number, specs in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, canonical_order(specs), random)
        places.update((spec.name, name) for spec in specs)
    total = sum(spec.nbytes for specs in shards for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", shape.config())
    return folder


def _shards(specs: Iterable[TensorSpec]) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if shard and size + spec.nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(spec)
        size += spec.nbytes
    yield shard


def _write_shard(path: Path, specs: list[TensorSpec], random: np.random.Generator) -> None:
    with path.open("wb") as file:
        file.write(format_header(specs, {"format": "pt"}))
        for spec in specs:
            for piece in _weights(spec, random):
                file.write(memoryview(piece).cast("B"))


def _weights(spec: TensorSpec, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the bits of bfloat16 weights: ones for a norm, else normal with deviation 0.02."""
    if len(spec.shape) == 1:
        yield np.full(spec.elements, 0x3F80, dtype="<u2")
        return
    for done in range(0, spec.elements, PIECE):
        values = random.standard_normal(min(PIECE, spec.elements - done), dtype=np.float32)
        values *= 0.02
        # The upper half of a float32 is a bfloat16.
        yield np.ascontiguousarray(values.astype("<f4", copy=False).view("<u2")[1::2])


def make_adapter(
    folder: Path,
    shape: LlamaShape,
    projections: Sequence[str],
    *,
    seed: int = 1,
    rank: int = RANK,
) -> Path:
    """Write a PEFT adapter (float32, r = 16 unless told, alpha = 32) and return its folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(shape.layers):
        for projection in projections:
            out, into = shape.linear(projection)
            key = f"base_model.model.{module_name(layer, projection)}"
            down = random.standard_normal((rank, into), dtype=np.float32)
            up = random.standard_normal((out, rank), dtype=np.float32)
            tensors[f"{key}.lora_A.weight"] = down * np.float32(into**-0.5)
            tensors[f"{key}.lora_B.weight"] = up * np.float32(0.01)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(projections),
    }
    _write_json(folder / "adapter_config.json", config)
    return folder


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


PLACES: Final = (
    *(f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)),
    "mid_block.attentions.0",
    *(f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)),
)
"""Transformer blocks of the U-Net of Stable Diffusion 1.5, with these widths."""
WIDTHS: Final = (
    320,
    320,
    640,
    640,
    1280,
    1280,
    1280,
    1280,
    1280,
    1280,
    640,
    640,
    640,
    320,
    320,
    320,
)


def sizes_of(width: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of the nine linear layers of such a block."""
    sizes = {f"attn1.to_{leaf}": (width, width) for leaf in ("q", "k", "v", "out.0")}
    sizes |= {f"attn2.to_{leaf}": (width, width) for leaf in ("q", "out.0")}
    sizes |= {f"attn2.to_{leaf}": (width, 768) for leaf in ("k", "v")}
    return sizes | {"ff.net.2": (width, 4 * width)}
