"""A job in parts: planning a huge model, finishing a thousand parts, and what sharing costs.

The huge models are sparse files with true headers: nothing of them is read but headers.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from harness import (
    ALL_LINEAR,
    ATTENTION,
    PYTHON,
    TINY_LLAMA,
    Command,
    Figure,
    Timing,
    common_arguments,
    loratool_command,
    make_adapter,
    make_base,
    measure,
    print_report,
    read_through,
    say,
    work_folder,
)
from safetensors.numpy import save_file

from loratool.files.safetensors import format_header
from loratool.files.spec import TensorSpec

SHARDS: Final = 163
EXPERTS: Final = 186
"""Of three projections in a shard: 558 tensors."""
HIDDEN: Final = 4096
WIDTH: Final = 944
"""So that a shard is 4.3 GB."""
TOUCHED: Final = 18
"""Modules of a shard that the adapter is for: about 3,000 in all."""
MANY: Final = 1000
PLANNING: Final = """
import json, sys, time
from pathlib import Path
from loratool.shards.forms import form_text
from loratool.shards.job import Job
from loratool.shards.model import model_job
from loratool.shards.roots import Roots
from loratool.verbs.merging.planning import plan_merge

base, adapter, output = map(Path, sys.argv[1:4])
times = [time.perf_counter()]
plan = plan_merge(base, [adapter], output=output)
times.append(time.perf_counter())
roots = Roots.of({"base": base, "adapter 0": adapter})
job = model_job(plan, output, roots, told={})
times.append(time.perf_counter())
digest = job.digest
times.append(time.perf_counter())
sizes = [len(form_text(part.form)) for part in job.parts]
plan, parts, digest = (after - before for before, after in zip(times, times[1:]))
print(json.dumps({"plan": plan, "parts": parts, "digest": digest, "count": len(sizes),
    "mean": sum(sizes) / len(sizes), "largest": max(sizes)}))
"""
"""Where the time of a plan goes, and how large the parts are."""
RECORDS: Final = """
import sys
from pathlib import Path
from loratool.shards.folder import PartsFolder
from loratool.shards.job import Job, Settings, Task, carry_out

folder = PartsFolder(Path(sys.argv[1]))
document = folder.plan()
def none(task):
    with (folder.made / task.name).open("wb") as file:
        file.truncate(sizes[task.name])
    return {"files": {task.name: sizes[task.name]}, "bytes": sizes[task.name], "kept": [1.0],
        "total": [1.0], "is_empty": False, "digests": []}
base = Path(sys.argv[2])
sizes = {path.name: path.stat().st_size for path in base.glob("*.safetensors")}
for number, (name, size) in enumerate(document["parts"], 1):
    carry_out(none, Task(number, name, "", document["digest"], folder.output, {}, Settings()))
"""
"""Records of all parts by the library's own function; the files are sparse."""


def main() -> int:
    """Run the benchmark."""
    parser = common_arguments(__doc__, runs=3)
    parser.add_argument("--measured", type=Path, help="write here what simulate_workers.py takes")
    arguments = parser.parse_args()
    timings: list[Timing] = []
    figures: list[Figure] = []
    with work_folder(arguments) as folder:
        planning(folder, arguments.runs, arguments.scale, timings, figures)
        finishing(folder, arguments.runs, arguments.scale, timings, figures)
        measured = sharing(folder, arguments.runs, arguments.scale, timings, figures)
    if arguments.measured is not None:
        measured["planning"] = next(t.wall for t in timings if t.name == NOTHING)
        measured["finish"] = next(t.wall for t in timings if t.name.startswith("--finish"))
        arguments.measured.write_text(json.dumps(measured, indent=2) + "\n")
    print_report("jobs in parts", timings, figures, as_json=arguments.json)
    return 0


# ------------------------------------------------------------------------------------- planning

NOTHING: Final = "a share with nothing left to do, 163 shards of 4.3 GB"


def planning(
    folder: Path, runs: int, scale: float, timings: list[Timing], figures: list[Figure]
) -> None:
    """Measure the plan of a model with DeepSeek-V3's files."""
    shards = max(2, round(SHARDS * scale))
    say(f"{shards} sparse shards of 4.3 GB")
    base = sparse_base(folder / "huge", shards, EXPERTS, (WIDTH, HIDDEN))
    adapter = sparse_adapter(folder / "huge-adapter", shards, TOUCHED, (WIDTH, HIDDEN))
    output = folder / "huge-out"
    merge = [*loratool_command(), "merge", base, adapter, "-o", output]
    # A share beyond the number of parts has none: all of the plan, and nothing to do.
    share = [*merge, "--shards", "1000000/1000000"]
    found = measure(
        [
            Command("python -c pass", [PYTHON, "-c", "pass"]),
            Command("merge --dry-run of the same", [*merge, "--dry-run", "--json"]),
            Command(NOTHING, share, folder / "huge-out.loratool-parts"),
        ],
        runs,
    )
    timings += found
    figures.append(
        Figure(NOTHING, found[-1].wall, "s", "at most 2 s", f"{found[-1].peak / 1e6:.0f} MB")
    )
    said = subprocess.run(
        [PYTHON, "-c", PLANNING, base, adapter, output], capture_output=True, text=True, check=True
    )
    parts = json.loads(said.stdout)
    figures += [Figure(f"of that: {key}", parts[key], "s") for key in ("plan", "parts", "digest")]
    figures.append(
        Figure(
            "JSON of a part, mean",
            parts["mean"] / 1e3,
            "kB",
            "about 20 kB",
            f"largest {parts['largest'] / 1e3:.1f} kB of {parts['count']}",
        )
    )


def sparse_base(folder: Path, shards: int, experts: int, shape: tuple[int, int]) -> Path:
    """Write a model of sparse shards, with three projections of each expert, and return it."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    rows, columns = shape
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        specs = []
        for expert, leaf in _projections(experts):
            size = (columns, rows) if leaf == "down_proj" else (rows, columns)
            specs.append(TensorSpec(f"{_module(shard, expert, leaf)}.weight", "BF16", size))
        header = format_header(specs, {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.nbytes for spec in specs))
        weight_map.update((spec.name, name) for spec in specs)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "deepseek_v3"}')
    return folder


def _projections(experts: int) -> Iterator[tuple[int, str]]:
    for expert in range(experts):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            yield expert, leaf


def _module(shard: int, expert: int, leaf: str) -> str:
    return f"model.layers.{shard}.mlp.experts.{expert}.{leaf}"


def sparse_adapter(folder: Path, shards: int, touched: int, shape: tuple[int, int]) -> Path:
    """Write an adapter of rank 1 on so many modules of each shard."""
    folder.mkdir()
    tensors: dict[str, np.ndarray] = {}
    for shard in range(shards):
        for expert, leaf in list(_projections(touched))[:touched]:
            rows, columns = shape[::-1] if leaf == "down_proj" else shape
            key = f"base_model.model.{_module(shard, expert, leaf)}"
            tensors[f"{key}.lora_A.weight"] = np.ones((1, columns), np.float16)
            tensors[f"{key}.lora_B.weight"] = np.ones((rows, 1), np.float16)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({leaf for _, leaf in list(_projections(touched))[:touched]})
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# ------------------------------------------------------------------------------------ finishing


def finishing(
    folder: Path, runs: int, scale: float, timings: list[Timing], figures: list[Figure]
) -> None:
    """Measure the end of a merge whose thousand parts are there."""
    shards = max(2, round(MANY * scale))
    say(f"{shards} sparse shards of 1 GB and their records")
    base = sparse_base(folder / "many", shards, 43, (WIDTH, HIDDEN))
    adapter = sparse_adapter(folder / "many-adapter", shards, 3, (WIDTH, HIDDEN))
    output = folder / "many-out"
    merge = [*loratool_command(), "merge", base, adapter, "-o", output]
    timing = Timing(f"--finish of {shards:,} parts")
    for number in range(runs):
        begin = [*merge, "--shards", f"{shards + 1}/{shards + 1}", "-q"]
        subprocess.run(begin, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([PYTHON, "-c", RECORDS, output, base], check=True)
        say(f"run {number + 1} of {runs}: records are there")
        (once,) = measure([Command(timing.name, [*merge, "--finish"], output)], 1, warm_up=False)
        timing.walls += once.walls
        timing.cpus += once.cpus
        timing.peaks += once.peaks
    timings.append(timing)
    figures.append(
        Figure(timing.name, timing.wall, "s", "at most 2 s", f"{timing.peak / 1e6:.0f} MB")
    )


# -------------------------------------------------------------------------------------- sharing


def sharing(
    folder: Path, runs: int, scale: float, timings: list[Timing], figures: list[Figure]
) -> dict[str, Any]:
    """Measure merge, verify and extract in one process, in shares, and by processes."""
    shape = TINY_LLAMA.scaled(scale)
    base = make_base(folder / "base", shape)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    adapter = make_adapter(folder / "adapter", shape, ALL_LINEAR)
    small = make_adapter(folder / "small", shape, ATTENTION)
    tuned, out, copy = folder / "tuned", folder / "out", folder / "copy"
    program = loratool_command()
    subprocess.run([*program, "merge", base, small, "-o", tuned, "-q"], check=True)
    read_through(base)
    read_through(tuned)
    merge = [*program, "merge", base, adapter, "-o", out]
    verify = [*program, "verify", tuned, "--base", base, "--adapter", small]
    extract = [*program, "extract", base, tuned, "--rank", "4", "-o", out]
    found = measure(
        [
            Command("cp -r", ["cp", "-r", base, copy], copy),
            Command("merge --dry-run", [*merge, "--dry-run", "--json"]),
            *(
                Command(f"{name}{label}", argv, None if name == "verify" else out)
                for name, words in (("merge", merge), ("verify", verify), ("extract", extract))
                for label, argv in ways(words)
            ),
        ],
        runs,
    )
    timings += found
    named = {timing.name: timing for timing in found}
    for name in ("merge", "verify", "extract"):
        for label, _ in ways([]):
            if label:
                figures.append(ratio(f"{name}{label}", named, name))
    figures.append(Figure("merge / cp -r", named["merge"].wall / named["cp -r"].wall))
    figures.append(
        Figure(
            "merge, --shards 1/1 / cp -r", named["merge, --shards 1/1"].wall / named["cp -r"].wall
        )
    )
    start = named["merge --dry-run"].wall
    return {"start": start, "bytes_per_second": size / (named["merge"].wall - start)}


def ways(words: Sequence[str | Path]) -> Iterator[tuple[str, list[str | Path]]]:
    """Yield the ways of doing all of a command."""
    yield "", [*words]
    yield ", --shards 1/1", [*words, "--shards", "1/1", "--finish"]
    yield ", 1/2 and 2/2 at once", [PYTHON, "-c", AT_ONCE, *words]
    yield ", --executor processes:2", [*words, "--executor", "processes:2"]


AT_ONCE: Final = """
import subprocess, sys
words = [*sys.argv[1:], "--threads", "1", "--finish", "--shards"]
workers = [subprocess.Popen([*words, share]) for share in ("1/2", "2/2")]
sys.exit(max(worker.wait() for worker in workers))
"""
"""Two processes; whoever ends last makes the output."""


def ratio(name: str, named: dict[str, Timing], of: str) -> Figure:
    """Return the median ratio of two rows within one run."""
    each = [a / b for a, b in zip(named[name].walls, named[of].walls, strict=True)]
    note = f"{min(each):.2f} to {max(each):.2f}; {named[name].peak / 1e6:.0f} MB a process"
    return Figure(f"{name} / {of}", statistics.median(each), "", "", note)


if __name__ == "__main__":
    sys.exit(main())
