"""Carry out a conversion: bytes that only move are moved, the rest is computed module by module.

A conversion that changes names alone is a copy: torch is not imported, and the hashes that go
into metadata are taken while the bytes are still in the system's cache.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loratool.adapter.config import CONFIG_NAME
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError
from loratool.files.atomic import check_output, staged
from loratool.files.container import read_view
from loratool.files.gathering import Piece, gather
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.files.transfer import read_into, write_all
from loratool.ops.algebra.sidecars import write_sidecars
from loratool.ops.conversion.arrays import Rounded, decode
from loratool.ops.conversion.plan import HASH_KEY, LEGACY_HASH_KEY, ConversionPlan, OutputPart
from loratool.ops.conversion.values import Stored

if TYPE_CHECKING:
    from torch import Tensor

    from loratool.ops.conversion.arrays import Array

__all__ = ["Outcome", "measure", "run_conversion"]

Progress = Callable[[int, int], None]
THREADS: Final = 2
SYNC_BELOW: Final = 64 << 20
BLOCK: Final = 4 << 20
LEGACY_SPAN: Final = (0x100000, 0x110000)
LARGEST_NORM: Final = 1e100
TOO_ROUGH: Final = 2e-3
"""A relative error beyond this is no longer the rounding of a 16-bit dtype alone."""


@dataclass
class Outcome:
    """What was found while a conversion ran.

    Attributes:
        errors: Module to the squared norm of its delta and of the error of what was written.
        shifted: Modules of which part of the scale went into A, a power of two.
        nonfinite: Modules whose delta holds NaN or infinity, and has no error that means anything.
    """

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    shifted: list[str] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)

    def relative(self, module: str) -> float:
        """Return ``‖written - Δ‖ / ‖Δ‖`` of one module; 0 where it was moved."""
        norm, error = self.errors.get(module, (0.0, 0.0))
        return math.sqrt(error / norm) if norm else 0.0

    @property
    def relative_error(self) -> float:
        """The same over all modules that were computed."""
        norm = math.fsum(pair[0] for pair in self.errors.values())
        error = math.fsum(pair[1] for pair in self.errors.values())
        return math.sqrt(error / norm) if norm else 0.0


def run_conversion(
    plan: ConversionPlan,
    output: Path,
    *,
    inputs: Sequence[Path],
    force: bool = False,
    progress: Progress | None = None,
    digest: Future[str] | None = None,
) -> Outcome:
    """Write ``plan`` at ``output``, whole or not at all.

    Args:
        plan: What to write.
        output: Where.
        inputs: What the output may not touch.
        force: Replace an existing output.
        progress: Called with bytes done and bytes in all.
        digest: The SHA-256 of the input, which the metadata has room for.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    check_output(output, force=force, inputs=[*inputs, *plan.inputs()], needed=plan.nbytes)
    files = InputFiles(plan.stamps)
    is_synced = plan.nbytes < SYNC_BELOW
    try:
        with staged(output, folder=plan.is_folder, force=force, sync=is_synced) as place:
            for path in plan.stamps:
                files.descriptor(path)
            weights = place / plan.weights_name if plan.is_folder else place
            if plan.is_torch:
                outcome = _save_torch(plan, weights, files, progress)
            else:
                outcome = _save(plan, weights, files, progress, digest, is_synced=is_synced)
            files.check_unchanged()
            if plan.is_folder:
                write_sidecars(plan.sidecars, place)
                if plan.config is not None:
                    (place / CONFIG_NAME).write_bytes(plan.config_text)
    finally:
        files.close()
    return outcome


def measure(plan: ConversionPlan) -> Outcome:
    """Compute what would be written, and its errors, without writing."""
    files = InputFiles(plan.stamps)
    try:
        outcome = Outcome()
        for item in plan.parts:
            if not item.is_moved:
                _computed(item, outcome)
        files.check_unchanged()
    finally:
        files.close()
    return outcome


class _Writer:
    """Writes tensors at their places; bytes that only move are collected and moved together."""

    def __init__(self, plan: ConversionPlan, descriptor: int, files: InputFiles) -> None:
        self.descriptor = descriptor
        self.files = files
        self.places = plan.offsets()
        self.pieces: list[Piece] = []

    def move(self, spec: TensorSpec, stored: StoredTensor) -> None:
        """Take stored bytes, in the order that their view has."""
        place = self.places[spec.name]
        if not spec.nbytes:
            return
        if stored.strides is not None:
            write_all(self.descriptor, read_view(stored), place)
        else:
            self.pieces.append(Piece(place, spec.nbytes, stored.path, stored.offset))

    def number(self, spec: TensorSpec, number: float) -> None:
        """Take one number, as float32."""
        data = struct.pack("<f", number)
        self.pieces.append(Piece(self.places[spec.name], len(data), data=data))

    def write(self, spec: TensorSpec, made: Rounded) -> None:
        """Write computed values."""
        if spec.nbytes:
            write_all(self.descriptor, made.bits.data.cast("B"), self.places[spec.name])

    def flush(self) -> None:
        """Move everything that was collected."""
        gather(self.pieces, self.descriptor, self.files.descriptor)
        self.pieces = []


def _save(
    plan: ConversionPlan,
    weights: Path,
    files: InputFiles,
    progress: Progress | None,
    digest: Future[str] | None,
    *,
    is_synced: bool,
) -> Outcome:
    outcome = Outcome()
    descriptor = os.open(weights, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, plan.nbytes)
        writer = _Writer(plan, descriptor, files)
        done = 0
        with ThreadPoolExecutor(THREADS) as pool:
            work = pool.map(lambda item: _write_part(item, writer, outcome), plan.parts)
            for item, _ in zip(plan.parts, work, strict=True):
                done += sum(spec.nbytes for spec in item.specs.values())
                if progress is not None and not item.is_moved:
                    progress(done, plan.nbytes)
        for carried in plan.carried:
            if carried.constant is not None:
                writer.number(carried.spec, carried.constant)
            elif carried.sources[0].spec.dtype == carried.spec.dtype:
                writer.move(carried.spec, carried.sources[0])
            else:
                values = decode(carried.sources[0])
                writer.write(carried.spec, Rounded.of(values, carried.spec.dtype))
        writer.flush()
        if progress is not None:
            progress(plan.nbytes, plan.nbytes)
        if digest is not None:
            plan = plan.with_digest(digest.result())
        header = plan.header
        if plan.is_hashed:
            header = plan.header_with(_hashes(plan, descriptor, weights))
        write_all(descriptor, memoryview(header), 0)
        if is_synced:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return outcome


def _write_part(item: OutputPart, writer: _Writer, outcome: Outcome) -> None:
    made = {} if item.is_moved else _computed(item, outcome)
    for slot, value in item.part.values.items():
        spec = item.specs[slot]
        if slot in made:
            writer.write(spec, made[slot])
        else:
            assert isinstance(value, Stored)
            writer.move(spec, value.tensor)


def _computed(item: OutputPart, outcome: Outcome) -> dict[Slot, Rounded]:
    """Return the tensors of a module that do not only move, and note the error.

    Raises:
        AdapterError: A value is finite in the input and not in the output.
    """
    part = item.part
    exact = {
        slot: value.evaluate()
        for slot, value in part.values.items()
        if not (isinstance(value, Stored) and value.dtype == item.specs[slot].dtype)
    }
    made = {slot: Rounded.of(array, item.specs[slot].dtype) for slot, array in exact.items()}
    is_exact = all(made[slot].is_exact for slot in made)
    if part.is_plain and not (is_exact and item.approximation is None):
        exact |= {s: v.evaluate() for s, v in part.values.items() if s not in exact}
        made = _measured(item, exact, made, outcome)
    for slot, array in made.items():
        if not array.is_finite:
            raise AdapterError(
                item.specs[slot].name,
                f"does not fit into {item.specs[slot].dtype}",
                hint="write a wider dtype with --dtype float32",
            )
    return made


def _measured(
    item: OutputPart,
    exact: Mapping[Slot, Array],
    made: dict[Slot, Rounded],
    outcome: Outcome,
) -> dict[Slot, Rounded]:
    """Note the error of a module; return its tensors, the scale shared where that is better."""
    part = item.part
    low, high = part.slots
    truth = _oriented(item, exact)
    norm, error = _squares(truth, _oriented(item, {**exact, **_values(made)}))
    if not all(array_is_finite(array) for array in truth):
        outcome.nonfinite.append(part.module)
        return made
    if not math.isfinite(error) or error > TOO_ROUGH**2 * norm:
        # Too large or too small for the dtype: share the scale with A, by a power of two.
        shift = _balance(exact[low], exact[high])
        other = {low: exact[low] * shift, high: exact[high] / shift}
        trial = {slot: Rounded.of(array, item.specs[slot].dtype) for slot, array in other.items()}
        found = {**exact, **_values(made), **_values(trial)}
        _, better = _squares(truth, _oriented(item, found))
        if not math.isfinite(error) or better < error:
            made, error = {**made, **trial}, better
            outcome.shifted.append(part.module)
    if item.approximation is not None:
        norm = item.approximation.squared_norm
        error += item.approximation.squared_error
    outcome.errors[part.module] = (norm, error)
    return made


def _values(made: Mapping[Slot, Rounded]) -> dict[Slot, Array]:
    return {slot: array.values for slot, array in made.items()}


def _oriented(item: OutputPart, values: Mapping[Slot, Array]) -> tuple[Array, Array]:
    """Return A ``(r, columns)`` and B ``(rows, r)``, however they are stored."""
    low, high = (values[slot] for slot in item.part.slots)
    if low.ndim == 3 and item.is_transposed:  # stacked experts, which mlx-lm does not transpose
        return low, high
    if item.is_transposed:
        return low.T, high.T
    return low.reshape(low.shape[0], -1), high.reshape(high.shape[0], -1)


def array_is_finite(array: Array) -> bool:
    """Whether an array holds neither NaN nor infinity."""
    import numpy as np

    return bool(np.isfinite(array).all())


def _squares(exact: tuple[Array, Array], made: tuple[Array, Array]) -> tuple[float, float]:
    """Return ``‖Δ‖²`` and ``‖written - Δ‖²`` from r × r Gram matrices.

    Both are capped at the largest number of float64, in one proportion.
    """
    import numpy as np

    (down, up), (low, high) = exact, made
    if down.ndim == 3:
        pairs = [_squares((down[i], up[i]), (low[i], high[i])) for i in range(down.shape[0])]
        return math.fsum(norm for norm, _ in pairs), math.fsum(error for _, error in pairs)
    with np.errstate(invalid="ignore", over="ignore"):
        peaks = [float(np.abs(array).max(initial=0.0)) or 1.0 for array in (down, up)]
        if not all(map(math.isfinite, peaks)):
            return math.nan, math.nan
        down, low = down / peaks[0], low / peaks[0]
        up, high = up / peaks[1], high / peaks[1]
        norm = float(((up.T @ up) * (down @ down.T)).sum())
        left = np.concatenate([high - up, up], axis=1)
        right = np.concatenate([low, low - down], axis=0)
        error = float(((left.T @ left) * (right @ right.T)).sum())
    error = max(0.0, error) if math.isfinite(error) else math.inf
    size = min(peaks[0] * peaks[1], LARGEST_NORM) ** 2
    return norm * size, error * size


def _balance(down: Array, up: Array) -> float:
    """Return the power of two that makes the largest elements of both factors alike."""
    import numpy as np

    high, low = float(np.abs(up).max()), float(np.abs(down).max())
    if not high or not low or not math.isfinite(high / low):
        return 1.0
    return 2.0 ** round(math.log2(high / low) / 2)


def _hashes(plan: ConversionPlan, descriptor: int, path: Path) -> dict[str, str]:
    """Return kohya's hashes: of all data, and of 64 kB at a fixed place with training metadata."""
    start, size = len(plan.header), plan.nbytes
    whole = hashlib.sha256()
    buffer = memoryview(bytearray(BLOCK))
    for offset in range(start, size, BLOCK):
        view = buffer[: min(BLOCK, size - offset)]
        read_into(descriptor, view, offset, path=path)
        whole.update(view)
    header = plan.legacy_header
    first, last = LEGACY_SPAN
    piece = header[first:last]
    begin = max(first, len(header)) - len(header)
    end = min(last - len(header), size - start)
    if begin < end:
        view = memoryview(bytearray(end - begin))
        read_into(descriptor, view, start + begin, path=path)
        piece += bytes(view)
    return {
        HASH_KEY: whole.hexdigest(),
        LEGACY_HASH_KEY: hashlib.sha256(piece).hexdigest()[:8],
    }


def _save_torch(
    plan: ConversionPlan, weights: Path, files: InputFiles, progress: Progress | None
) -> Outcome:
    """Write a dictionary of tensors as ``torch.save`` does; all of it is in memory at once."""
    import torch

    from loratool.ops.tensors import read_tensor, torch_dtype

    def tensor(spec: TensorSpec, made: Rounded) -> Tensor:
        data = torch.frombuffer(bytearray(made.bits.data.cast("B")), dtype=torch_dtype(spec.dtype))
        return data.reshape(spec.shape)

    outcome = Outcome()
    tensors: dict[str, Tensor] = {}
    for item in plan.parts:
        made = {} if item.is_moved else _computed(item, outcome)
        for slot, value in item.part.values.items():
            spec = item.specs[slot]
            if slot in made:
                tensors[spec.name] = tensor(spec, made[slot])
            else:
                assert isinstance(value, Stored)
                tensors[spec.name] = read_tensor(value.tensor)
    for carried in plan.carried:
        spec = carried.spec
        if carried.constant is not None:
            one = torch.tensor(carried.constant)
        else:
            one = read_tensor(carried.sources[0])
        tensors[spec.name] = one.to(torch_dtype(spec.dtype)).reshape(spec.shape)
    torch.save({spec.name: tensors[spec.name].contiguous() for spec in plan.specs}, weights)
    if progress is not None:
        progress(plan.nbytes, plan.nbytes)
    return outcome
