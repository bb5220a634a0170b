"""``merge``: base + Σ weight · delta, as a checkpoint like the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

from loratool.files.places import located
from loratool.names.strengths import Weights
from loratool.plan.devices import exactly
from loratool.plan.model import ModelPlan
from loratool.plan.plan import write
from loratool.plan.traffic import traffic_of
from loratool.shards.course import ShareReport
from loratool.shards.division import Division, Executors
from loratool.shards.job import Settings
from loratool.verbs.arguments import one_or_more, output_path
from loratool.verbs.merging.planning import merge_options, plan_merge
from loratool.verbs.merging.result import MergeReport

__all__ = ["MergeReport", "merge", "plan_merge"]

AnyPath = str | PathLike[str]
Progress = Callable[[int, int], None]


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
    shards: str | None = None,
    finish: bool = False,
    wait: bool = False,
    resume: bool = False,
    executor: Executors | None = None,
    progress: Progress | None = None,
) -> MergeReport | ShareReport:
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
        shards: Do a share of the output's files, ``"3/8"`` or ``"auto"`` (what nobody does yet),
            into the folder ``OUT.loratool-parts``.
        finish: Make the output of what is in that folder; after ``shards`` only if all is there.
        wait: Wait until all parts are there; with ``"auto"`` take over those of workers that died.
        resume: Keep what is done where the merge is interrupted, and go on with it.
        executor: What does the parts: an executor of :mod:`concurrent.futures`, a function that
            makes one, or a name such as ``"processes:4"``. See ``docs/machines.md``.
        progress: Called with bytes done and bytes in all.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    output, adapters = output_path(output), one_or_more(adapters)
    division = Division.of(shards, finish=finish, wait=wait, resume=resume, executor=executor)
    paths = [located(path) for path in adapters]

    asked: dict[str, Any] = {
        "weights": weights,
        "dtype": dtype,
        "alpha": alpha,
        "adapter_name": adapter_name,
        "skip": skip,
        "enable_lora": enable_lora,
        "quantized": quantized,
        "allow_nonfinite": allow_nonfinite,
        "no_card": no_card,
    }

    def planned() -> ModelPlan:
        return plan_merge(base, paths, output=output, **asked)

    if division is not None and not dry_run:
        from loratool.verbs.merging.divided import DividedMerge
        from loratool.verbs.merging.recorded import recorded_base

        root = base if base is not None else recorded_base(paths[0], adapter_name=adapter_name)[0]
        return DividedMerge(
            planned,
            root,
            adapters,
            output,
            force=force,
            asked=merge_options(len(paths), **asked),
            settings=Settings(device, threads),
            progress=progress,
        ).carry_out(division)
    plan = planned()
    report = MergeReport.of(plan, output)
    if dry_run:
        if division is not None and division.share is not None:
            from loratool.verbs.merging.divided import share_note

            report = replace(report, notes=(*report.notes, share_note(plan, division.share)))
        return replace(report, traffic=traffic_of(plan, output))
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
    return report.written(outcome, quantized=quantized)
