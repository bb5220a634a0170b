"""Decompose every module, keep what is done where it can be taken up again, then write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from loratool.adapter.slots import Slot
from loratool.errors import MergeError, OptionError
from loratool.files.container import read_bytes
from loratool.files.inputs import InputFiles
from loratool.math.factored import factor
from loratool.math.lowrank import LowRank
from loratool.ops.algebra.plan import AdapterPlan, ModuleJob
from loratool.ops.algebra.writing import TensorWriter, in_parallel
from loratool.ops.extraction.computing import (
    BUDGET_RANK,
    Extracted,
    Settings,
    change_of,
    decompose,
    load_extracted,
)
from loratool.ops.extraction.pairing import Leftover, Target
from loratool.ops.tensors import torch_dtype

__all__ = ["ModuleResult", "decompose_all", "leftover_changes", "open_spool", "write_modules"]

Progress = Callable[[int, int], None]
RUN_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """What was written for one module, against the difference that it stands for.

    Attributes:
        module: Its name.
        rank: Rank that was written; 0 for one that the budget leaves out.
        squared_norm: ``‖Δ‖_F²`` of the difference.
        squared_error: ``‖written - Δ‖_F²``, rounding to the dtype included.
        singular_values: Those that were kept, descending.
        computed: All that were computed.
        floor: The singular value that rounding of the finetuned weight alone can leave.
    """

    module: str
    rank: int
    squared_norm: float
    squared_error: float
    singular_values: tuple[float, ...]
    computed: tuple[float, ...]
    floor: float

    @property
    def relative_error(self) -> float:
        """``‖written - Δ‖ / ‖Δ‖``."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


def open_spool(folder: Path, key: dict[str, Any]) -> None:
    """Make sure that what ``folder`` holds, if anything, is of the same run.

    Raises:
        OptionError: It holds the modules of another run.
    """
    described = json.dumps(key, sort_keys=True)
    known = folder / RUN_FILE
    if known.is_file() and known.read_text() not in (described, ""):
        raise OptionError(
            "--resume",
            f"{folder} holds modules of a run with other inputs or options",
            hint="give the same options, or delete that folder",
        )
    partial = known.with_suffix(".partial")
    partial.write_text(described)
    partial.replace(known)


def decompose_all(
    targets: Sequence[Target],
    settings: Settings,
    files: InputFiles,
    spool: Path,
    *,
    threads: int | None,
    progress: Progress | None,
    budget_ranks: Mapping[str, int] | None = None,
) -> list[Extracted]:
    """Decompose every target; those that ``spool`` has already are read from there.

    Args:
        targets: The modules.
        settings: How.
        files: Where to read.
        spool: Where factors are kept.
        threads: Number of modules in work at a time.
        progress: Called with how much is done and how much there is.
        budget_ranks: How many ranks to compute, by name; other targets are left out. By default
            the first look at all that a budget takes.
    """

    def one(item: tuple[int, Target]) -> Extracted:
        number, target = item
        rank = (budget_ranks or {}).get(target.name, BUDGET_RANK)
        path = spool / f"{number}.safetensors"
        if path.is_file():
            try:
                known = load_extracted(target.name, path, settings)
            except (SafetensorError, KeyError, ValueError, OSError):
                path.unlink()  # a damaged file is computed again
            else:
                if budget_ranks is None or known.computed >= min(rank, target.smallest_side):
                    return known
        return decompose(target, settings, files, spool, number, rank)

    numbered = [
        (number, target)
        for number, target in enumerate(targets)
        if budget_ranks is None or target.name in budget_ranks
    ]
    return in_parallel(
        one,
        numbered,
        threads=threads,
        progress=progress,
        sizes=[target.nbytes for _, target in numbered],
    )


def leftover_changes(
    leftovers: Sequence[Leftover], files: InputFiles, *, threads: int | None
) -> dict[str, float]:
    """Return ``‖tuned - base‖²`` of every leftover that has both, by name."""

    def one(item: Leftover) -> float | None:
        if item.base is None or item.tuned is None:
            return None
        if item.is_comparable:
            change = change_of(item.base, item.tuned, files)
            return change if math.isfinite(change) else None
        specs = (item.base.spec, item.tuned.spec)
        is_alike = len({(spec.dtype, spec.shape) for spec in specs}) == 1
        is_same = is_alike and read_bytes(item.base) == read_bytes(item.tuned)
        return 0.0 if is_same else None

    found = in_parallel(one, leftovers, threads=threads)
    return {
        item.name: value for item, value in zip(leftovers, found, strict=True) if value is not None
    }


def write_modules(
    plan: AdapterPlan,
    modules: dict[str, Extracted],
    writer: TensorWriter,
    *,
    clamp: float | None,
    threads: int | None,
) -> list[ModuleResult]:
    """Write the factors of every module at its rank, and return what that costs."""
    twins = {job.joint.twin_of: job for job in plan.jobs if job.route == "twin"}

    def one(job: ModuleJob) -> ModuleResult:
        twin = twins.get(job.joint.name)
        return _write(job, modules[job.joint.name], writer, clamp, twin)

    jobs = [job for job in plan.jobs if job.route != "twin"]
    return in_parallel(one, jobs, threads=threads)


def _write(
    job: ModuleJob,
    module: Extracted,
    writer: TensorWriter,
    clamp: float | None,
    twin: ModuleJob | None,
) -> ModuleResult:
    from safetensors.torch import load_file

    assert module.path is not None
    tensors = load_file(module.path)
    dtype = torch_dtype(job.output.dtype)
    rank = job.output.rank
    ups, downs = [], []
    lost = 0.0
    for expert in range(len(module.values)):
        up = _fitted(tensors[f"up.{expert}"], rank, dim=1)
        down = _fitted(tensors[f"down.{expert}"], rank, dim=0)
        exact = LowRank(up, down)
        if clamp is not None:
            up, down = _clamped(up, down, tensors[f"values.{expert}"], clamp)
        written = LowRank(up.to(dtype), down.to(dtype))
        lost += factor(exact).squared_distance(written)
        if not (bool(written.up.isfinite().all()) and bool(written.down.isfinite().all())):
            raise MergeError(
                job.joint.name,
                f"its factors overflow in {job.output.dtype}",
                hint="write it with --dtype float32 (or bfloat16)",
            )
        ups.append(written.up)
        downs.append(written.down)
    stacked_up = torch.stack(ups, dim=2).flatten(1) if len(ups) > 1 else ups[0]
    for slot, spec in job.specs.items():
        is_up = slot in (Slot.UP, Slot.EMBEDDING_UP)
        writer.write(spec, stacked_up if is_up else torch.cat(downs))
    if twin is not None:
        writer.write(twin.specs[Slot.DOWN], ups[0].mT)
        writer.write(twin.specs[Slot.UP], downs[0].mT)
    values = sorted((v for one in module.values for v in one[:rank]), reverse=True)
    return ModuleResult(
        job.joint.name,
        rank,
        module.squared_norm,
        module.tail(rank) + lost,
        tuple(values),
        tuple(sorted((v for one in module.values for v in one), reverse=True)),
        module.floor,
    )


def _fitted(matrix: Tensor, rank: int, *, dim: int) -> Tensor:
    """Return the leading ranks of a factor, or fill it with zeros."""
    have = matrix.shape[dim]
    if have >= rank:
        return matrix.narrow(dim, 0, rank)
    pad = (0, rank - have) if dim == 1 else (0, 0, 0, rank - have)
    return torch.nn.functional.pad(matrix, pad)


def _clamped(up: Tensor, down: Tensor, values: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Clamp ``U S`` and ``Vᵀ`` as kohya's extraction does: at ± one quantile of both together."""
    root = _fitted(values.sqrt().unsqueeze(0), up.shape[1], dim=1).to(up)
    inverse = torch.where(root > 0, 1 / root.clamp(min=1e-30), 0.0)
    left, right = up * root, down * inverse.mT
    limit = float(torch.cat([left.flatten(), right.flatten()]).double().quantile(quantile))
    return left.clamp(-limit, limit), right.clamp(-limit, limit)
