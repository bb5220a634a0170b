"""``verify``: prove that a merged model is what ``merge`` should have written.

The merge is planned again, every tensor is computed again block by block, and compared with the
file instead of being written. A model that another tool has merged passes too, if it holds the
same values but for the last bit: other libraries add up in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from os import PathLike
from typing import Any

from loratool.adapter.findings import Finding, Findings, finding
from loratool.base.config import DTYPE_KEYS
from loratool.base.model import Model, open_model
from loratool.codecs.codec import CodedTensor
from loratool.errors import LoratoolError
from loratool.files.dtypes import DTYPES, OUTPUT_DTYPES
from loratool.files.json import read_json_object
from loratool.files.places import located
from loratool.files.spec import TensorSpec
from loratool.names.strengths import Weights
from loratool.plan.devices import exactly
from loratool.plan.model import ModelPlan
from loratool.plan.plan import run
from loratool.shards.course import ShareReport
from loratool.shards.division import Division, Executors
from loratool.shards.job import Settings
from loratool.verbs.arguments import one_or_more
from loratool.verbs.merging.compared import CompareSink, told
from loratool.verbs.merging.comparison import check_files, check_record
from loratool.verbs.merging.planning import plan_merge

__all__ = ["verify"]

AnyPath = str | PathLike[str]


@exactly
def verify(
    merged: AnyPath,
    *,
    base: AnyPath | None = None,
    adapters: Sequence[AnyPath] | AnyPath = (),
    weights: Weights = (),
    alpha: float | None = None,
    adapter_name: str | None = None,
    skip: Sequence[str] = (),
    enable_lora: Sequence[bool] = (),
    device: str = "auto",
    threads: int | None = None,
    shards: str | None = None,
    finish: bool = False,
    wait: bool = False,
    executor: Executors | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Findings | ShareReport:
    """Compare a merged model with what base and adapters make.

    Args:
        merged: The model to check, file or folder.
        base: The base it was made from; ``None`` for the one that the model records, or, where
            adapters are given, the one that the first of them does.
        adapters: The adapters, in the order of the merge.
        weights: As in the merge.
        alpha: As in the merge.
        adapter_name: As in the merge.
        skip: As in the merge.
        enable_lora: As in the merge.
        device: As in the merge.
        threads: Number of worker threads.
        shards: Compare a share of the model's files, as in :func:`merge`; what was found comes
            together in the folder ``MERGED.loratool-parts``.
        finish: Return what was found in all shares.
        wait: As in the merge.
        executor: As in the merge.
        progress: Called with bytes done and bytes in all.

    Returns:
        Findings, errors first; none means that every tensor is what it should be: the bytes
            of this library on this kind of processor.

    Raises:
        LoratoolError: Base or adapters cannot be read, or the merge is not possible.
    """
    paths: tuple[AnyPath, ...] = one_or_more(adapters)
    merged = located(merged)
    division = Division.of(shards, finish=finish, wait=wait, executor=executor)
    asked: dict[str, Any] = {
        "weights": weights,
        "alpha": alpha,
        "adapter_name": adapter_name,
        "skip": skip,
        "enable_lora": enable_lora,
    }
    recorded: Mapping[str, Any] = {}
    if not paths:
        from loratool.verbs.merging.recipe import recorded_merge

        merge = recorded_merge(merged, located(base) if base is not None else None, asked)
        base, paths, recorded = merge.base, merge.adapters, merge.options
        asked = {name: recorded.get(name, value) for name, value in asked.items()}
    if base is None:
        from loratool.verbs.merging.recorded import recorded_base

        base, _ = recorded_base(paths[0], adapter_name=adapter_name)
    base = located(base)
    original = open_model(base)
    try:
        result = open_model(merged)
    except LoratoolError as error:
        if not merged.exists():
            raise
        return Findings([finding("LT109", error.where, error.what, error.hint)])
    plan = plan_merge(
        base,
        paths,
        **asked,
        dtype=recorded.get("dtype") or _dtype_of(original, result),
        quantized="keep" if _is_kept(original, result) else "dequantize",
    )
    found = [*_check_layout(plan, result), *check_files(plan, result)]
    if division is not None:
        from loratool.verbs.merging.divided import divided_comparison

        return divided_comparison(
            plan, result, found, base, paths, division, Settings(device, threads), progress
        )
    sink = CompareSink(result.raw, {step.spec.name: step.source for step in plan.steps()})
    with closing(sink):
        steps = sorted(plan.steps(), key=lambda step: not step.is_copy)  # copies come first
        sink.expect(step.spec.name for step in steps)
        outcome = run(
            plan,
            sink,
            allow_nonfinite=True,
            device=device,
            threads=threads,
            progress=progress,
        )
        sink.files.check_unchanged()
    folder = result.path if plan.is_folder else None
    return told([*found, *sink.findings(), *check_record(plan.history, folder, outcome)])


def _is_kept(base: Model, merged: Model) -> bool:
    """Whether every coded weight of the base is coded in the merged model too."""
    coded = [name for name, one in base.tensors.items() if isinstance(one, CodedTensor)]
    return bool(coded) and all(isinstance(merged.tensors.get(n), CodedTensor) for n in coded)


def _dtype_of(base: Model, merged: Model) -> str | None:
    """Return the ``--dtype`` that the merge must have been given, or ``None``."""
    pairs = {
        (base.tensors[name].spec.dtype, stored.spec.dtype)
        for name, stored in merged.raw.items()
        if name in base.tensors
        and DTYPES[stored.spec.dtype].is_mergeable
        and (not base.config.is_inside or isinstance(base.tensors[name], CodedTensor))
    }
    targets = {new for _, new in pairs}
    if len(targets) != 1:
        return None
    names = {header: name for name, header in OUTPUT_DTYPES.items()}
    name = names.get(targets.pop())
    if all(old == new for old, new in pairs):
        # Asked for all the same, if the configuration says so and the base's does not.
        said = {merged.config.raw.get(key) for key in DTYPE_KEYS}
        known = {base.config.raw.get(key) for key in DTYPE_KEYS}
        return name if name in said - known else None
    return name


def _check_layout(plan: ModelPlan, merged: Model) -> Iterator[Finding]:
    expected = {step.spec.name: step for step in plan.steps()}
    for name, step in expected.items():
        stored = merged.raw.get(name)
        if stored is None:
            yield finding("LT101", name, f"is missing; expected {_words(step.spec)}")
        elif (stored.spec.dtype, stored.spec.shape) != (step.spec.dtype, step.spec.shape):
            yield finding("LT103", name, f"is {_words(stored.spec)}, expected {_words(step.spec)}")
    for name in merged.raw:
        if name not in expected:
            yield finding("LT102", name, "is neither in the base nor made by the adapters")
    for checkpoint in merged.checkpoints.values():
        if checkpoint.index is not None:
            content = read_json_object(checkpoint.index)
            for name in checkpoint.tensors:
                if name not in content["weight_map"]:
                    yield finding("LT108", checkpoint.index, f"does not list {name!r}")


def _words(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"
