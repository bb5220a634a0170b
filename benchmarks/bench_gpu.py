"""``loratool extract`` on a GPU against the processor and against what the hardware allows.

One call of at most eight minutes, unattended. Every row is a line of JSON, printed and written to
``--rows`` at once, so that a run that is cut off counts as far as it came. A stage that would
begin too late is skipped, and one that fails is a row too. ``--small`` is the rehearsal: the same
rows with small shapes. Without a GPU it says so and measures the processor alone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file

import loratool
from loratool.math.extraction import Decomposition
from loratool.plan.gpu import exact_products

HAS_GPU: Final = torch.cuda.is_available()
DEVICE: Final = "cuda:0" if HAS_GPU else "cpu"
LLAMA_8B: Final = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
LAYERS_8B: Final = 32
BLOCK: Final = 64 << 20


@dataclass
class Bench:
    """Where rows go, and what the run is made of.

    Attributes:
        rows: The file of rows.
        folder: For models and adapters.
        shapes: Of the linear layers of one layer.
        layers: How many.
        begin: When the run began.
        limit: Seconds that it may take.
    """

    rows: Path
    folder: Path
    shapes: dict[str, tuple[int, int]]
    layers: int
    begin: float
    limit: float

    def row(self, what: str, **facts: Any) -> None:
        """Print and keep one row."""
        text = json.dumps({"what": what, "at": round(time.monotonic() - self.begin), **facts})
        print(text, flush=True)
        with self.rows.open("a") as file:
            file.write(text + "\n")

    @property
    def pair(self) -> tuple[Path, Path]:
        """The large pair of models."""
        return self.folder / "base", self.folder / "tuned"

    @property
    def is_late(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() - self.begin > self.limit


def main() -> int:
    """Run every stage that time is left for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=Path("gpu.jsonl"), help="where rows go")
    parser.add_argument("--limit", type=float, default=450, help="seconds; default 450")
    parser.add_argument("--layers", type=int, default=8, help="layers of the pair; default 8")
    parser.add_argument("--small", action="store_true", help="a rehearsal with small shapes")
    parser.add_argument("--work-dir", type=Path, help="where models are made")
    parser.add_argument("--against", type=Path, help="another checkout, whose extract is timed too")
    arguments = parser.parse_args()
    shapes = LLAMA_8B
    if arguments.small:
        shapes = {name: (m // 8, n // 8) for name, (m, n) in LLAMA_8B.items()}
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        bench = Bench(
            arguments.rows,
            Path(folder),
            shapes,
            arguments.layers,
            time.monotonic(),
            arguments.limit,
        )
        stages: dict[str, tuple[float, Callable[[], None]]] = {
            "facts": (0.05, lambda: facts(bench)),
            "floors": (0.25, lambda: floors(bench)),
            "make_pair": (0.40, lambda: make_pair(bench)),
            "quality": (0.45, lambda: quality(bench)),
            "verbs": (0.50, lambda: verbs(bench)),
            "drills": (0.60, lambda: drills(bench)),
            "extraction": (0.70, lambda: extraction(bench)),
            "pipeline": (0.80, lambda: pipeline(bench)),
            "processes": (0.90, lambda: processes(bench, arguments.against)),
            "from_disk": (0.97, lambda: from_disk(bench)),
        }
        for name, (share, stage) in stages.items():
            if time.monotonic() - bench.begin > share * bench.limit:
                bench.row(name, skipped="too late")
                continue
            try:
                stage()
            except Exception as error:
                bench.row(name, error=f"{type(error).__name__}: {error}"[:500])
    return 0


def clock(call: Callable[[], Any], runs: int = 3) -> list[float]:
    """Return seconds, the GPU idle before and after; the first call warms up and is left out."""
    found = []
    for _ in range(runs + 1):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        found.append(round(time.perf_counter() - start, 6))
    return found[1:]


def synchronize() -> None:
    """Wait for the GPU."""
    if HAS_GPU:
        torch.cuda.synchronize()


def facts(bench: Bench) -> None:
    """Say what machine this is."""
    query = "name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current"
    query += ",clocks.sm,clocks.max.sm"
    told = ""
    with contextlib.suppress(OSError):
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        told = found.stdout.strip()
    usage = os.statvfs(bench.folder)
    bench.row(
        "facts",
        gpu=told or None,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        numpy=np.__version__,
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
        free_disk_gb=round(usage.f_bavail * usage.f_frsize / 1e9),
        tf32_override=os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    )


def floors(bench: Bench) -> None:
    """Measure what bounds the work: bus, products, small decompositions, waits."""
    if HAS_GPU:
        size = 256 << 20
        start = time.perf_counter()
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        bench.row("pin 256 MiB", seconds=[round(time.perf_counter() - start, 4)])
        pageable = torch.ones(size, dtype=torch.uint8)
        there = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        for name, source, target in (
            ("to the GPU, pinned", pinned, there),
            ("to the GPU, pageable", pageable, there),
            ("from the GPU, pinned", there, pinned),
        ):
            seconds = clock(lambda s=source, t=target: t.copy_(s, non_blocking=True), 5)
            bench.row(name, seconds=seconds, gb_s=round(size / min(seconds) / 1e9, 1))
        tiny = torch.ones(8, device=DEVICE)
        bench.row("launch and wait", seconds=clock(lambda: float(tiny[0]), 20)[-3:])
    for width in (24, 72, 272):
        with exact_products() if HAS_GPU else contextlib.nullcontext():
            left = torch.randn(4096, 14336, device=DEVICE)
            right = torch.randn(14336, width, device=DEVICE)
            seconds = clock(lambda a=left, b=right: a @ b)
        work = 2 * 4096 * 14336 * width
        bench.row(
            f"float32 4096 x 14336 @ {width}",
            seconds=seconds,
            tflops=round(work / min(seconds) / 1e12, 2),
        )
    for side in (72, 272, 816):
        gram = torch.randn(side, side, dtype=torch.float64)
        gram = gram @ gram.mT
        host = gram.numpy()
        bench.row(f"eigh {side}, processor", seconds=clock(lambda g=host: np.linalg.eigh(g)))
        if HAS_GPU:
            there = gram.to(DEVICE)
            bench.row(f"eigh {side}, GPU", seconds=clock(lambda g=there: torch.linalg.eigh(g)))


def make_pair(bench: Bench) -> None:
    """Make a base and a finetuned model, and a float32 pair of exactly low rank."""
    start = time.perf_counter()
    generator = torch.Generator(DEVICE).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator)

    kinds = {"": torch.bfloat16, "exact-": torch.float32}
    for kind, dtype in kinds.items():
        for path in bench.pair:
            (bench.folder / f"{kind}{path.name}").mkdir()
        layers = bench.layers if not kind else 1
        for layer in range(layers):
            base, tuned = {}, {}
            for name, (m, n) in bench.shapes.items():
                if kind and "mlp" in name:
                    continue
                weight = (drawn(m, n) * 0.02).to(dtype)
                change = drawn(m, 16) @ drawn(16, n) * 2e-4
                if not kind:
                    change += 1e-4 * drawn(m, n)
                key = f"model.layers.{layer}.{name}.weight"
                base[key] = weight.cpu()
                tuned[key] = (weight.float() + change).to(dtype).cpu()
            for side, tensors in (("base", base), ("tuned", tuned)):
                file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
                save_file(tensors, bench.folder / f"{kind}{side}" / file)
        for side in ("base", "tuned"):
            index(bench.folder / f"{kind}{side}", layers, bench.shapes, skip_mlp=bool(kind))
    size = sum(file.stat().st_size for path in bench.pair for file in path.iterdir())
    bench.row("make the pair", seconds=[round(time.perf_counter() - start, 1)], gb=size / 1e9)


def index(folder: Path, layers: int, names: Any, *, skip_mlp: bool) -> None:
    """Write the index of a folder of shards, one for each layer."""
    shards = {
        f"model.layers.{layer}.{name}.weight": f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        for layer in range(layers)
        for name in names
        if not (skip_mlp and "mlp" in name)
    }
    text = json.dumps({"metadata": {}, "weight_map": shards})
    (folder / "model.safetensors.index.json").write_text(text)


def quality(bench: Bench) -> None:
    """Compare the error with the optimum, and the GPU's factors with the processor's."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    m, n = (4096, 4096) if bench.shapes is LLAMA_8B else (512, 512)
    for kind in ("gaussian", "rank 16 + noise", "j^-0.5"):
        delta = torch.randn(m, n, device=DEVICE, generator=generator)
        if kind.startswith("rank"):
            left = torch.randn(m, 16, device=DEVICE, generator=generator)
            right = torch.randn(16, n, device=DEVICE, generator=generator)
            delta = left @ right / math.sqrt(m) + 0.01 * delta
        elif kind.startswith("j"):
            left = torch.linalg.qr(delta).Q
            right = torch.linalg.qr(torch.randn(n, m, device=DEVICE, generator=generator)).Q
            delta = (left * torch.arange(1, m + 1, device=DEVICE) ** -0.5) @ right.mT
        wide = delta.double()
        values = torch.linalg.eigvalsh(wide @ wide.mT).flip(0).clamp(min=0)
        for rank in (16, 64, 256):
            if 4 * rank > m:
                continue
            with exact_products() if HAS_GPU else contextlib.nullcontext():
                found = Decomposition(delta, np.random.default_rng(3)).leading(rank)
            here = Decomposition(delta.cpu().numpy(), np.random.default_rng(3)).leading(rank)
            product = found.up.double() @ found.down.double()
            beside = (
                torch.from_numpy(here.up).to(DEVICE).double()
                @ torch.from_numpy(here.down).to(DEVICE).double()
            )
            lost = float((wide - product).square().sum())
            bench.row(
                f"quality: {kind}, rank {rank}, {m} x {n}",
                error_over_optimum=math.sqrt(lost / float(values[rank:].sum())),
                reported_over_true=math.sqrt(found.squared_residual / lost),
                from_the_processors=float((product - beside).norm() / wide.norm()),
            )


def verbs(bench: Bench) -> None:
    """Run the verbs whose arithmetic may be a GPU's on both, and compare what they write."""
    base, tuned = bench.folder / "exact-base", bench.folder / "exact-tuned"
    adapter = bench.folder / "verbs-adapter"
    loratool.extract(base, tuned, adapter, rank=16, device="cpu")
    calls: dict[str, Callable[[Path, str], Any]] = {
        "merge": lambda out, device: loratool.merge(base, [adapter], out, device=device),
        "truncate": lambda out, device: loratool.truncate(adapter, out, rank=8, device=device),
        "compose": lambda out, device: loratool.compose(
            [adapter, adapter], out, weights=[0.7, 0.4], rank=12, device=device
        ),
    }
    for name, call in calls.items():
        seconds: dict[str, float] = {}
        for device in dict.fromkeys(("cpu", DEVICE)):
            start = time.perf_counter()
            call(bench.folder / f"{name}-{device}", device)
            seconds[device] = round(time.perf_counter() - start, 3)
        one, other = (digest(bench.folder / f"{name}-{device}") for device in ("cpu", DEVICE))
        bench.row(f"{name}, processor and GPU", seconds=seconds, bytes_equal=one == other)
        bench.row(f"{name}, largest difference", relative=far(bench.folder, name))
    found = [loratool.compare([adapter, adapter], device=device) for device in ("cpu", DEVICE)]
    bench.row("compare", cosines=[report.cosine for report in found])


def far(folder: Path, name: str) -> float:
    """Return the largest relative difference of two outputs' tensors, products for factors."""
    from safetensors.torch import load_file

    sides = []
    for device in ("cpu", DEVICE):
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted((folder / f"{name}-{device}").glob("*.safetensors")):
            tensors |= load_file(file)
        downs = [key for key in tensors if "lora_A" in key]
        if downs:
            tensors = {
                key: tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
                for key in downs
            }
        sides.append(tensors)
    return max(
        float((value.double() - sides[1][key].double()).norm() / value.double().norm())
        for key, value in sides[0].items()
    )


def digest(folder: Path) -> str:
    """Return the SHA-256 of the weights of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def drills(bench: Bench) -> None:
    """Run with little memory and with TF32 asked for by the environment; run twice."""
    base, tuned = bench.folder / "exact-base", bench.folder / "exact-tuned"
    report = loratool.extract(base, tuned, bench.folder / "exact", rank=16, device=DEVICE)
    bench.row("an exactly low-rank float32 pair", relative_error=report.relative_error)
    loratool.extract(base, tuned, bench.folder / "again", rank=16, device=DEVICE)
    same = digest(bench.folder / "exact") == digest(bench.folder / "again")
    bench.row("the same run again", bytes_equal=same)
    if not HAS_GPU:
        return
    for name, environment in (
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1", {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}),
        ("another process", {}),
    ):
        out = bench.folder / f"drill-{len(environment)}"
        command = ["extract", base, tuned, "--rank", "16", "--device", "cuda", "-o", out, "-q"]
        run_process(command, environment)
        bench.row(name, bytes_equal=digest(out) == digest(bench.folder / "exact"))
    total = torch.cuda.get_device_properties(0).total_memory
    for megabytes in (4000, 500, 200, 80):
        out = bench.folder / f"memory-{megabytes}"
        script = (
            "import torch, loratool, json; "
            f"torch.cuda.set_per_process_memory_fraction({(megabytes << 20) / total!r}); "
            f"found = loratool.extract({str(base)!r}, {str(tuned)!r}, {str(out)!r}, rank=16, "
            f"device={DEVICE!r}); "
            "print(json.dumps([found.relative_error, [n for n in found.notes if 'GPU' in n]]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        told = json.loads(done.stdout) if done.returncode == 0 else done.stderr[-300:]
        bench.row(f"{megabytes} MiB of the GPU's memory", error_and_notes=told)


def extraction(bench: Bench) -> None:
    """Extract in this process: the context stands, the pages are warm."""
    read_all(bench)
    for device in dict.fromkeys((DEVICE, "cpu")):
        for rank in (16, 64, 256):
            seconds, peak, error, out = [], 0, 0.0, bench.folder / f"extract-{device}-{rank}"
            for turn in range(3 if device != "cpu" else 1):
                if bench.is_late or (device == "cpu" and rank == 256):
                    break
                if HAS_GPU:
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                report = loratool.extract(
                    *bench.pair, out, rank=rank, device=device, force=bool(turn)
                )
                seconds.append(round(time.perf_counter() - start, 3))
                error = report.relative_error
                peak = torch.cuda.max_memory_allocated() if HAS_GPU else 0
            if seconds:
                whole = min(seconds) * LAYERS_8B / bench.layers
                bench.row(
                    f"extract, rank {rank}, {device}",
                    seconds=seconds,
                    projected_8b=round(whole, 2),
                    relative_error=error,
                    peak_gpu=peak,
                    peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                )


def pipeline(bench: Bench) -> None:
    """Take the work apart: differences alone, and other numbers of lanes and readers."""
    from loratool.verbs.extraction import gpu

    usual = gpu.LANES, gpu.READERS
    for lanes, readers in ((2, 12), (4, 8), (4, 12), (6, 12), (8, 12)):
        if bench.is_late:
            break
        gpu.LANES, gpu.READERS = lanes, readers
        seconds = {
            "differences alone": min(clock(lambda: differences_alone(bench), 2)),
            "rank 64": min(clock(lambda: extract_again(bench, 64), 2)),
        }
        torch.cuda.empty_cache()
        bench.row(f"{lanes} lanes, {readers} readers", seconds=seconds)
    gpu.LANES, gpu.READERS = usual


def extract_again(bench: Bench, rank: int) -> None:
    """Extract, over what was written before."""
    out = bench.folder / "again-and-again"
    loratool.extract(*bench.pair, out, rank=rank, device=DEVICE, force=out.exists())


def differences_alone(bench: Bench) -> None:
    """Bring both weights of every module to the GPU and subtract them there."""
    from loratool.base.model import open_model
    from loratool.files.inputs import InputFiles
    from loratool.plan.threads import in_parallel
    from loratool.verbs.extraction.gpu import LANES, GpuDifferences
    from loratool.verbs.extraction.pairs import Selection, pair

    base, tuned = (open_model(path) for path in bench.pair)
    targets = pair(base, tuned, Selection()).targets
    files = InputFiles({})
    try:
        with GpuDifferences([torch.device(DEVICE)], lanes=LANES) as found:
            in_parallel(
                lambda target: found.run(lambda one: one.read(target, 0, files).squared_norm),
                targets,
                threads=LANES,
            )
    finally:
        files.close()


def read_all(bench: Bench) -> None:
    """Read both models with several threads, which is what the work cannot be faster than."""
    files = [file for path in bench.pair for file in sorted(path.glob("*.safetensors"))]

    def chunks() -> Iterator[tuple[Path, int]]:
        for file in files:
            for start in range(0, file.stat().st_size, BLOCK):
                yield file, start

    def read(place: tuple[Path, int]) -> int:
        buffer = bytearray(BLOCK)
        with place[0].open("rb", buffering=0) as file:
            return os.preadv(file.fileno(), [buffer], place[1])

    for threads in (4, 12):
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            size = sum(pool.map(read, chunks()))
        seconds = time.perf_counter() - start
        bench.row(
            f"read both models, warm, {threads} threads",
            seconds=[round(seconds, 3)],
            gb_s=round(size / seconds / 1e9, 2),
        )


def processes(bench: Bench, against: Path | None) -> None:
    """Extract as whole processes, start-up and CUDA's own included."""
    for checkout in (None, *([against] if against else [])):
        for device in dict.fromkeys((DEVICE.partition(":")[0], "cpu")):
            if bench.is_late:
                return
            out = bench.folder / f"process-{device}-{checkout is not None}"
            command = ["extract", *bench.pair, "--rank", "64", "--device", device, "-o", out, "-q"]
            seconds = run_process(command, {}, checkout)
            name = f"whole process, rank 64, {device}"
            bench.row(name + (", the other checkout" if checkout else ""), seconds=[seconds])


def run_process(command: list[Any], environment: dict[str, str], checkout: Any = None) -> float:
    """Run loratool in a process of its own; return seconds."""
    root = str(checkout or Path(loratool.__file__).parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "loratool", *map(str, command)],
        check=True,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
    )
    return round(time.perf_counter() - start, 3)


def from_disk(bench: Bench) -> None:
    """Extract with pages that have to come from the disk first, and read them alone."""
    rank, seconds = 64, []
    for _ in range(2):
        if bench.is_late:
            return
        forget(bench)
        start = time.perf_counter()
        loratool.extract(
            *bench.pair, bench.folder / "cold", rank=rank, device=DEVICE, force=bool(seconds)
        )
        seconds.append(round(time.perf_counter() - start, 3))
    bench.row(f"extract from the disk, rank {rank}, {DEVICE}", seconds=seconds)
    forget(bench)
    read_all(bench)
    bench.row("median of it", seconds=[statistics.median(seconds)])


def forget(bench: Bench) -> None:
    """Have the system forget what it holds of both models."""
    os.sync()
    for path in bench.pair:
        for file in path.glob("*.safetensors"):
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
