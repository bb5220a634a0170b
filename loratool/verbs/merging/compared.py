"""What a merge computes, compared with what lies in a model: for ``verify``, whole or in parts."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loratool.adapter.findings import Finding, Findings, finding
from loratool.codecs.codec import CodedTensor
from loratool.codecs.weights import Weight
from loratool.errors import FileFormatError
from loratool.files.container import read_bytes
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.files.transfer import read_into
from loratool.plan.devices import exactly
from loratool.plan.history import History
from loratool.plan.lanes import ByteRange, Spot
from loratool.plan.model import ModelPlan, Step
from loratool.plan.outcome import Outcome
from loratool.plan.run import run_files
from loratool.shards.job import Job, Task
from loratool.shards.model import ModelPart, model_parts, opened_part
from loratool.shards.roots import Roots
from loratool.verbs.merging.comparison import check_record

__all__ = ["CompareSink", "compare_job", "compare_part", "compared", "told"]

COMPARED_BYTES: Final = 1 << 20
"""What differs is looked at in parts of this size, which bounds the memory."""


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
class CompareSink:
    """Compares instead of writing.

    Attributes:
        merged: The tensors that it compares with, by name.
        sources: Those that what is computed is made of, by the names of that.
        joins: Tensors are looked at one by one.
        files: Where the tensors lie.
        differences: What was found, by name.
        lock: Holds that.
    """

    merged: Mapping[str, StoredTensor]
    sources: Mapping[str, Weight]
    joins: bool = False
    files: InputFiles = field(default_factory=lambda: InputFiles({}))
    differences: dict[str, _Difference] = field(default_factory=lambda: defaultdict(_Difference))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def expect(self, names: Iterable[str]) -> None:
        """Say which tensors will be looked at, in order."""
        for name in names:
            self.files.expect(*(self.merged[name].extents if name in self.merged else ()))

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
        source = self.sources.get(spec.name)
        if source is None or isinstance(source, CodedTensor):
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


@dataclass(frozen=True, slots=True)
class ComparedPart:
    """A part of a plan, and what it is compared with.

    Attributes:
        part: The part.
        merged: The tensors of the model, by name.
        sources: What the computed ones are made of, by name.
        history: How the model should have come to be, for the part that hashes the inputs.
        folder: Where its record lies, where it has one.
    """

    part: ModelPart
    merged: Mapping[str, StoredTensor]
    sources: Mapping[str, Weight]
    history: History | None = None
    folder: Path | None = None


def compare_job(
    plan: ModelPlan,
    merged: Path,
    tensors: Mapping[str, StoredTensor],
    findings: Sequence[Finding],
    roots: Roots,
) -> Job:
    """Return the comparison of a model with a plan as a job.

    Args:
        plan: What it should be.
        merged: The model.
        tensors: Its tensors, by name.
        findings: What was found of it before.
        roots: Where inputs lie.
    """

    def with_merged(part: ModelPart, steps: Sequence[Step]) -> ComparedPart:
        computed = part.all_spots
        names = [*(move.spec.name for move in part.moves), *computed]
        sources = {step.spec.name: step.source for step in steps if step.spec.name in computed}
        found = {name: tensors[name] for name in names if name in tensors}
        told = (plan.history, merged if plan.is_folder else None) if part.hashed else (None, None)
        return ComparedPart(part, found, sources, *told)

    parts, _ = model_parts(plan, roots, joins=False, allow_nonfinite=True, as_value=with_merged)
    closing = [found.as_json() for found in findings]
    return Job("verify", merged, tuple(parts), closing, roots.named, compare_part)


def compare_part(task: Task) -> Mapping[str, Any]:
    """Compare a part of a model; see :class:`loratool.shards.job.Work`.

    Raises:
        LoratoolError: A file changed or ended.
    """
    made, stamps = opened_part(task)
    assert isinstance(made, ComparedPart)
    outcome = Outcome()
    sink = CompareSink(made.merged, made.sources)

    @exactly
    def compare(*, device: str) -> None:
        run_files(
            made.part.works(outcome),
            sink,
            stamps,
            allow_nonfinite=True,
            device=device,
            threads=task.settings.threads,
            progress=task.beat,
        )

    with closing(sink):
        sink.expect(made.merged)
        compare(device=task.settings.device)
        sink.files.check_unchanged()
    found = [*sink.findings(), *check_record(made.history, made.folder, outcome)]
    return {"files": {}, "findings": [each.as_json() for each in found]}


def compared(document: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Findings:
    """Return what was found in all parts together.

    Raises:
        FileFormatError: The plan or a record is damaged, or of another command.
    """
    try:
        lists = [document["closing"], *(record["findings"] for record in records)]
        return told(Finding(**each) for found in lists for each in found)
    except (KeyError, TypeError):
        raise FileFormatError("the records of verify", "are damaged") from None


def told(found: Iterable[Finding]) -> Findings:
    """Return what was found, errors first."""
    order = sorted(found, key=lambda item: (item.severity != "error", item.code, item.where))
    return Findings(order, "every tensor is what it should be")
