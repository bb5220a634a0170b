"""Carry out a conversion: bytes that only move are moved, the rest is computed module by module.

A conversion that changes names alone is a copy: torch is not imported, and the hashes that go
into metadata are taken while the bytes are still in the system's cache.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loratool.adapter.config import CONFIG_NAME
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError, OutputError
from loratool.files.atomic import check_output, staged
from loratool.files.container import read_bytes
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.files.transfer import copy_range, read_into, write_all
from loratool.ops.algebra.sidecars import write_sidecars
from loratool.ops.conversion.plan import HASH_KEY, LEGACY_HASH_KEY, ConversionPlan, OutputPart
from loratool.ops.conversion.values import Stored, Value

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Outcome", "measure", "run_conversion"]

Progress = Callable[[int, int], None]
SYNC_BELOW: Final = 64 << 20
BLOCK: Final = 4 << 20
LEGACY_SPAN: Final = (0x100000, 0x110000)
TOO_ROUGH: Final = 2e-3
"""A relative error beyond this is no longer the rounding of a 16-bit dtype alone."""


@dataclass
class Outcome:
    """What was found while a conversion ran.

    Attributes:
        errors: Module to the squared norm of its delta and of the error of what was written.
        shifted: Modules of which part of the scale went into A, a power of two.
    """

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    shifted: list[str] = field(default_factory=list)

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
) -> Outcome:
    """Write ``plan`` at ``output``, whole or not at all.

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
                outcome = _save(plan, weights, files, progress, is_synced=is_synced)
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
    def __init__(self, plan: ConversionPlan, descriptor: int, files: InputFiles) -> None:
        self.descriptor = descriptor
        self.files = files
        self.places = plan.offsets()

    def move(self, spec: TensorSpec, stored: StoredTensor) -> None:
        """Write stored bytes, in the order that their view has."""
        if not spec.nbytes:
            return
        place = self.places[spec.name]
        if stored.strides is not None:
            write_all(self.descriptor, memoryview(read_bytes(stored)), place)
            return
        copy_range(
            self.files.descriptor(stored.path),
            self.descriptor,
            stored.offset,
            place,
            spec.nbytes,
            path=stored.path,
        )

    def write(self, spec: TensorSpec, values: Tensor) -> None:
        """Write computed values, already in the dtype of ``spec``."""
        data = tensor_bytes(values.reshape(spec.shape))
        if data.nbytes:
            write_all(self.descriptor, data, self.places[spec.name])


def tensor_bytes(values: Tensor) -> memoryview:
    """Return the bytes of a tensor of the processor."""
    import torch

    return memoryview(values.detach().contiguous().flatten().view(torch.uint8).numpy().data)


def _save(
    plan: ConversionPlan,
    weights: Path,
    files: InputFiles,
    progress: Progress | None,
    *,
    is_synced: bool,
) -> Outcome:
    outcome = Outcome()
    descriptor = os.open(weights, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, plan.nbytes)
        writer = _Writer(plan, descriptor, files)
        done = 0
        for item in plan.parts:
            _write_part(item, writer, outcome)
            done += sum(spec.nbytes for spec in item.specs.values())
            if progress is not None:
                progress(done, plan.nbytes)
        for carried in plan.carried:
            if carried.constant is not None:
                _write_number(writer, carried.spec, carried.constant)
            elif carried.sources[0].spec.dtype == carried.spec.dtype:
                writer.move(carried.spec, carried.sources[0])
            else:
                from loratool.ops.tensors import read_tensor, torch_dtype

                values = read_tensor(carried.sources[0]).to(torch_dtype(carried.spec.dtype))
                writer.write(carried.spec, values)
        header = plan.header
        if plan.is_hashed:
            header = plan.header_with(_hashes(plan, descriptor, weights))
            if len(header) != len(plan.header):
                raise OutputError(weights, "its header changed its length (a bug)")
        write_all(descriptor, memoryview(header), 0)
        if is_synced:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return outcome


def _write_number(writer: _Writer, spec: TensorSpec, number: float) -> None:
    import struct

    write_all(writer.descriptor, memoryview(struct.pack("<f", number)), writer.places[spec.name])


def _write_part(item: OutputPart, writer: _Writer, outcome: Outcome) -> None:
    if item.is_moved:
        for slot, value in item.part.values.items():
            assert isinstance(value, Stored)
            writer.move(item.specs[slot], value.tensor)
        return
    for slot, values in _computed(item, outcome).items():
        writer.write(item.specs[slot], values)


def _computed(item: OutputPart, outcome: Outcome) -> dict[Slot, Tensor]:
    """Return the tensors of a module in the dtypes that are written, and note the error.

    Raises:
        AdapterError: A value is finite in the input and not in the output.
    """
    part = item.part
    exact = {slot: value.evaluate() for slot, value in part.values.items()}
    made = {slot: values.to(_dtype(item.specs[slot])) for slot, values in exact.items()}
    if not part.is_plain:
        _check_finite(item, exact, made)
        return made
    low, high = part.slots
    pairs = _oriented(item, exact), _oriented(item, made)
    norm, error = _squares(*pairs)
    if not math.isfinite(error) or error > TOO_ROUGH**2 * norm:
        # Too large or too small for the dtype: share the scale with A, by a power of two.
        shift = _balance(exact[low], exact[high])
        other = dict(exact)
        other[low], other[high] = exact[low].double() * shift, exact[high].double() / shift
        trial = {slot: values.to(_dtype(item.specs[slot])) for slot, values in other.items()}
        _, better = _squares(pairs[0], _oriented(item, trial))
        if not math.isfinite(error) or better < error:
            made, error = trial, better
            outcome.shifted.append(part.module)
    _check_finite(item, exact, made)
    if item.approximation is not None:
        norm = item.approximation.squared_norm
        error += item.approximation.squared_error
    outcome.errors[part.module] = (norm, error)
    return made


def _oriented(item: OutputPart, values: Mapping[Slot, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A ``(r, columns)`` and B ``(rows, r)`` in float64, however they are stored."""
    low, high = (values[slot].double() for slot in item.part.slots)
    if low.ndim == 2 and low.shape[0] != item.part.rank:
        return low.T, high.T
    if low.ndim == 2 and high.shape[0] == item.part.rank != high.shape[1]:
        return low.T, high.T
    return low.flatten(1), high.flatten(1)


def _squares(exact: tuple[Tensor, Tensor], made: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return ``‖Δ‖²`` and ``‖written - Δ‖²`` from r × r Gram matrices."""
    import torch

    (down, up), (low, high) = exact, made
    norm = float(((up.T @ up) * (down @ down.T)).sum())
    left = torch.cat([high - up, up], dim=1)
    right = torch.cat([low, low - down], dim=0)
    error = float(((left.T @ left) * (right @ right.T)).sum())
    return norm, max(0.0, error) if math.isfinite(error) else math.inf


def _balance(down: Tensor, up: Tensor) -> float:
    """Return the power of two that makes the largest elements of both factors alike."""
    high, low = float(up.double().abs().max()), float(down.double().abs().max())
    if not high or not low or not math.isfinite(high / low):
        return 1.0
    return 2.0 ** round(math.log2(high / low) / 2)


def _check_finite(
    item: OutputPart, exact: Mapping[Slot, Tensor], made: Mapping[Slot, Tensor]
) -> None:
    for slot, values in made.items():
        if bool(exact[slot].isfinite().all()) and not bool(values.isfinite().all()):
            raise AdapterError(
                item.specs[slot].name,
                f"does not fit into {item.specs[slot].dtype}",
                hint="write a wider dtype with --dtype float32",
            )


def _dtype(spec: TensorSpec) -> torch.dtype:
    from loratool.ops.tensors import torch_dtype

    return torch_dtype(spec.dtype)


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

    from loratool.ops.tensors import read_tensor

    outcome = Outcome()
    tensors: dict[str, Tensor] = {}
    for item in plan.parts:
        made = _computed(item, outcome) if not item.is_moved else _evaluated(item.part.values)
        tensors |= {item.specs[slot].name: values for slot, values in made.items()}
    for carried in plan.carried:
        spec = carried.spec
        values = (
            torch.tensor(carried.constant)
            if carried.constant is not None
            else read_tensor(carried.sources[0]).reshape(spec.shape)
        )
        tensors[spec.name] = values.to(_dtype(spec))
    torch.save({spec.name: tensors[spec.name].contiguous() for spec in plan.specs}, weights)
    if progress is not None:
        progress(plan.nbytes, plan.nbytes)
    return outcome


def _evaluated(values: Mapping[Slot, Value]) -> dict[Slot, Tensor]:
    return {slot: value.evaluate() for slot, value in values.items()}
