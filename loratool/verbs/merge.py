"""``merge``: base + Σ weight · delta, as a checkpoint like the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Final

from loratool.display.document import Document, Lines
from loratool.display.figures import human_bytes
from loratool.display.shown import Shown
from loratool.files.places import located
from loratool.names.strengths import Weights
from loratool.plan.devices import exactly
from loratool.plan.model import ModelPlan
from loratool.plan.plan import write
from loratool.verbs.arguments import one_or_more, output_path
from loratool.verbs.merging.planning import plan_merge

__all__ = ["MergeReport", "merge", "plan_merge"]

AnyPath = str | PathLike[str]
Progress = Callable[[int, int], None]
RETENTION_WARNING: Final = 0.9


@dataclass(frozen=True)
class MergeReport(Shown):
    """What a merge did, or would do.

    Attributes:
        plan: What was decided.
        tensors: Tensors in the output.
        merged: Tensors of the base that changed.
        copied: Tensors that did not.
        added: Tensors that the base did not have.
        unused: Adapter keys left out on request.
        bytes_written: Bytes of the weights files, written or to be written.
        retention: ``⟨W' - W, Δ⟩ / ‖Δ‖²``, the share of the update that survived rounding to
            the output dtype; ``None`` where nothing was added to anything.
        output: Where it is, or would be.
        is_written: Whether it was written.
        notes: What a user should know, one sentence each.
    """

    plan: ModelPlan
    tensors: int
    merged: int
    copied: int
    added: int
    unused: tuple[str, ...]
    bytes_written: int
    retention: float | None
    output: Path
    is_written: bool = True
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, plan: ModelPlan, output: Path) -> MergeReport:
        """Return the report of a merge that is planned, and nothing more."""
        return cls(
            plan=plan,
            tensors=sum(1 for _ in plan.steps()),
            merged=plan.merged,
            copied=plan.copied,
            added=plan.added,
            unused=plan.unused,
            bytes_written=plan.nbytes,
            retention=None,
            output=output,
            is_written=False,
            notes=plan.notes,
        )

    @property
    def hub(self) -> Mapping[str, Any] | None:
        """Models and commits of what came from the hub; ``None`` where nothing did."""
        return self.plan.hub

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        if not self.is_written:
            return self.plan.as_json() | {"output": str(self.output), "retention": None}
        return {
            "schema": 1,
            "dry_run": False,
            "output": str(self.output),
            "tensors": self.tensors,
            "merged": self.merged,
            "copied": self.copied,
            "added": self.added,
            "unused": list(self.unused),
            "bytes_written": self.bytes_written,
            "retention": self.retention,
            "files": [{"name": file.name, "bytes": file.size} for file in self.plan.files],
            "sidecars": [{"name": item.name, "why": item.why} for item in self.plan.sidecars],
            "left_behind": [{"name": name, "why": why} for name, why in self.plan.left_behind],
            "peak_memory": self.plan.peak_memory,
            "notes": list(self.notes),
            **({"hub": self.hub} if self.hub else {}),
        }

    def document(self) -> Document:
        """Return what people see of it: one sentence, or the plan."""
        if not self.is_written:
            return self.plan.document()
        added = f", {self.added} added" if self.added else ""
        words = (
            f"{self.output}: {self.merged} tensors merged, {self.copied} copied{added}, "
            f"{human_bytes(self.bytes_written)}"
        )
        if self.retention is not None:
            words += f"; {min(self.retention, 1):.2%} of the update survived rounding"
        return Document((Lines((words,)),), self.notes)


@exactly
def merge(
    base: AnyPath | None,
    adapters: Sequence[AnyPath] | AnyPath,
    output: AnyPath,
    *,
    weights: Weights = (),
    dtype: str | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    alpha: float | None = None,
    adapter_name: str | None = None,
    skip: Sequence[str] = (),
    enable_lora: Sequence[bool] = (),
    quantized: str = "dequantize",
    device: str = "auto",
    threads: int | None = None,
    sync: bool = False,
    no_card: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge adapters into a base, file to file.

    The arithmetic is ``W' = round(W + Σ weight · scale · B @ A)`` with float32 sums (float64
    for a float64 base) and one rounding, however many adapters there are.

    Args:
        base: Folder or file of the base model, or its name on the hub; ``None`` for the one that
            the first adapter records.
        adapters: Adapters, each a file or a folder.
        output: Where the merged model goes: a folder, or a file where the base is one.
        weights: A number for each adapter, in order (missing ones are 1), and ``"PATTERN=N"`` for
            the modules that a pattern means, such as ``[0.8, "te1=0.5"]``; or a mapping of
            patterns to numbers. See ``docs/strength.md``.
        dtype: ``float32``, ``float16`` or ``bfloat16`` for every floating-point tensor.
        force: Replace an existing output.
        allow_nonfinite: Write NaN and infinity where they come out.
        alpha: Alpha for adapters that record none.
        adapter_name: Which adapter, where a path holds several.
        skip: Regular expressions; adapter keys that match are left out, and reported. With
            ``re:`` or ``glob:`` before them patterns for modules, as those of ``weights``.
        enable_lora: Which parts of a merged projection loralib's stacked factors are for.
        quantized: What becomes of quantised weights: ``dequantize`` writes them in the
            configuration's 16-bit dtype, and drops scales and the configuration of them.
        device: Where to compute: ``auto`` (the processor), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: Number of worker threads; by default one for each processor, at most eight.
        sync: Wait until the weights are on the disk, not only in the system's cache.
        no_card: Write no card; that of the input travels as it is.
        dry_run: Say what would be written, and write nothing.
        progress: Called with bytes done and bytes in all.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    output, adapters = output_path(output), one_or_more(adapters)
    paths = [located(path) for path in adapters]
    plan = plan_merge(
        base,
        paths,
        weights=weights,
        dtype=dtype,
        alpha=alpha,
        adapter_name=adapter_name,
        skip=skip,
        enable_lora=enable_lora,
        quantized=quantized,
        allow_nonfinite=allow_nonfinite,
        no_card=no_card,
        output=output,
    )
    if dry_run:
        return MergeReport.of(plan, output)
    outcome = write(
        plan,
        output,
        inputs=[plan.base, *paths],
        force=force,
        allow_nonfinite=allow_nonfinite,
        device=device,
        threads=threads,
        sync=sync,
        progress=progress,
    )
    retention = outcome.weights.retention
    notes = list(plan.notes)
    if retention is not None and retention < RETENTION_WARNING:
        wider = "write a wider one with --dtype float32"
        if quantized == "keep":
            wider = "leave out --quantized keep to write plain numbers"
        notes.append(
            f"only {retention:.1%} of the update survived rounding to the output's dtype; {wider}"
        )
    return replace(
        MergeReport.of(plan, output), is_written=True, retention=retention, notes=tuple(notes)
    )
