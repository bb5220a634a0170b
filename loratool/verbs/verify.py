"""``verify``: prove that a merged model is what ``merge`` should have written.

The merge is planned again, every tensor is computed again block by block, and compared with the
file instead of being written. A model that another tool has merged passes too, if it holds the
same values but for the last bit: other libraries add up in another order.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Final

from loratool.adapter.findings import Finding, Findings, finding
from loratool.base.config import DTYPE_KEYS
from loratool.base.model import Model, open_model
from loratool.codecs.codec import CodedTensor
from loratool.errors import LoratoolError
from loratool.files.container import read_bytes
from loratool.files.dtypes import DTYPES, OUTPUT_DTYPES
from loratool.files.inputs import InputFiles
from loratool.files.json import read_json_object
from loratool.files.places import located
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.files.transfer import read_into
from loratool.names.strengths import Weights
from loratool.plan.devices import exactly
from loratool.plan.lanes import ByteRange, Spot
from loratool.plan.model import ModelPlan, Step
from loratool.plan.plan import run
from loratool.verbs.arguments import one_or_more
from loratool.verbs.merging.comparison import check_files, check_record
from loratool.verbs.merging.planning import plan_merge

__all__ = ["verify"]

AnyPath = str | PathLike[str]
COMPARED_BYTES: Final = 1 << 20
"""What differs is looked at in parts of this size, which bounds the memory."""


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
    progress: Callable[[int, int], None] | None = None,
) -> Findings:
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
        progress: Called with bytes done and bytes in all.

    Returns:
        Findings, errors first; none means that every tensor is what it should be: the bytes
            of this library on this kind of processor.

    Raises:
        LoratoolError: Base or adapters cannot be read, or the merge is not possible.
    """
    paths: tuple[AnyPath, ...] = one_or_more(adapters)
    merged = located(merged)
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
    sink = _CompareSink(result.raw, {step.spec.name: step for step in plan.steps()})
    with closing(sink):
        sink.expect(plan)
        outcome = run(
            plan,
            sink,
            allow_nonfinite=True,
            device=device,
            threads=threads,
            progress=progress,
        )
        sink.files.check_unchanged()
    found += [*sink.findings(), *check_record(plan, result, outcome)]
    found.sort(key=lambda item: (item.severity != "error", item.code, item.where))
    return Findings(found, "every tensor is what it should be")


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


@dataclass
class _Difference:
    """How one tensor differs."""

    elements: int = 0
    far: int = 0
    largest: float = 0.0
    is_copy: bool = False


def _differing(
    dtype: str, expected: memoryview, actual: memoryview, before: memoryview | None
) -> tuple[int, int, float]:
    """Compare stored numbers: how many differ, how many by more than rounding, and how far."""
    import numpy as np

    from loratool.codecs import numbers
    from loratool.math.closeness import differing
    from loratool.math.precision import Precision

    kind = DTYPES[dtype]
    if not kind.is_float or kind.bits < 8:
        words = np.dtype(f"V{kind.block[1] if kind.block else max(8, kind.bits) // 8}")
        count = int(
            np.count_nonzero(np.frombuffer(expected, words) != np.frombuffer(actual, words))
        )
        return count, count, float(count > 0)
    shape = (kind.elements(len(expected)),)
    wanted, found, old = (
        None if data is None else numbers.decode(data, dtype, shape)
        for data in (expected, actual, before)
    )
    return differing(wanted, found, old, precision=Precision(kind.eps, kind.smallest))


@dataclass
class _CompareSink:
    """Compares instead of writing."""

    merged: Mapping[str, StoredTensor]
    steps: Mapping[str, Step]
    joins: bool = False
    files: InputFiles = field(default_factory=lambda: InputFiles({}))
    differences: dict[str, _Difference] = field(default_factory=lambda: defaultdict(_Difference))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def expect(self, plan: ModelPlan) -> None:
        """Say what will be read of the merged model, in order: what is copied comes first."""
        for step in sorted(plan.steps(), key=lambda step: not step.is_copy):
            stored = self.merged.get(step.spec.name)
            self.files.expect(*(stored.extents if stored is not None else ()))

    def close(self) -> None:
        """Close all files."""
        self.files.close()

    def clone(self, file: int, original: Path, files: InputFiles) -> bool:
        return False

    def copy(self, piece: ByteRange, files: InputFiles) -> None:
        actual = self._read(piece.spot.spec, piece.position, piece.size)
        if actual is None:
            return
        expected = memoryview(bytearray(piece.size))
        with files.using(piece.source) as descriptor:
            read_into(descriptor, expected, piece.source_offset, path=piece.source)
        if expected != actual:
            self._note(piece.spot.spec, expected, actual, None, is_copy=True)

    def write(self, spot: Spot, position: int, data: memoryview) -> None:
        actual = self._read(spot.spec, position, len(data))
        if actual is not None and data != actual:
            before = self._before(spot.spec, position, len(data))
            self._note(spot.spec, data, actual, before, is_copy=False)

    def _before(self, spec: TensorSpec, position: int, size: int) -> memoryview | None:
        """Return the source's values, where they lie as the result does."""
        source = self.steps[spec.name].source
        if isinstance(source, CodedTensor):
            return None
        if (source.spec.dtype, source.spec.shape) != (spec.dtype, spec.shape):
            return None
        return self._bytes(source, position, size)

    def _read(self, spec: TensorSpec, position: int, size: int) -> memoryview | None:
        stored = self.merged.get(spec.name)
        if stored is None or (stored.spec.dtype, stored.spec.shape) != (spec.dtype, spec.shape):
            return None
        return self._bytes(stored, position, size)

    def _bytes(self, stored: StoredTensor, position: int, size: int) -> memoryview:
        if not stored.is_run:
            return memoryview(read_bytes(stored))[position : position + size]
        view = memoryview(bytearray(size))
        with self.files.using(stored.path) as descriptor:
            read_into(descriptor, view, stored.offset + position, path=stored.path)
        return view

    def _note(
        self,
        spec: TensorSpec,
        expected: memoryview,
        actual: memoryview,
        before: memoryview | None,
        *,
        is_copy: bool,
    ) -> None:
        for start in range(0, len(expected), COMPARED_BYTES):
            part = slice(start, start + COMPARED_BYTES)
            elements, far, largest = _differing(
                spec.dtype,
                expected[part],
                actual[part],
                None if before is None else before[part],
            )
            with self.lock:
                difference = self.differences[spec.name]
                difference.elements += elements
                difference.far += far
                difference.largest = max(difference.largest, largest)
                difference.is_copy = is_copy

    def findings(self) -> Iterator[Finding]:
        """Yield one finding for every tensor that differs."""
        for name, found in sorted(self.differences.items()):
            total = self.merged[name].spec.elements
            share = f"{found.elements} of {total} elements"
            if found.is_copy:
                yield finding("LT104", name, f"differs from the base in {share}")
            elif found.far:
                yield finding(
                    "LT105",
                    name,
                    f"{share} differ, {found.far} by more than rounding; at most by "
                    f"{found.largest:.3g}",
                )
            elif found.elements:
                yield finding("LT106", name, f"{share} differ in the last bit")
