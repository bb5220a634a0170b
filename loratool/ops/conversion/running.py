"""Carry out a conversion: bytes that only move are moved, the rest is computed module by module.

A conversion that changes names alone is a copy: torch is not imported, and the hashes that go
into metadata are taken while the bytes are still in the system's cache.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loratool.adapter.config import CONFIG_NAME
from loratool.files.atomic import check_output, staged
from loratool.files.container import read_view
from loratool.files.gathering import Piece, gather
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.files.transfer import read_into, write_all
from loratool.ops.algebra.sidecars import write_sidecars
from loratool.ops.conversion.arrays import Rounded, decode
from loratool.ops.conversion.measuring import Outcome, computed
from loratool.ops.conversion.plan import HASH_KEY, LEGACY_HASH_KEY, ConversionPlan, OutputPart
from loratool.ops.conversion.values import Stored

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["measure", "run_conversion"]

Progress = Callable[[int, int], None]
THREADS: Final = 2
SYNC_BELOW: Final = 64 << 20
BLOCK: Final = 4 << 20
LEGACY_SPAN: Final = (0x100000, 0x110000)


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
                computed(item, outcome)
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
    made = {} if item.is_moved else computed(item, outcome)
    for slot, value in item.part.values.items():
        spec = item.specs[slot]
        if slot in made:
            writer.write(spec, made[slot])
        else:
            assert isinstance(value, Stored)
            writer.move(spec, value.tensor)


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
        made = {} if item.is_moved else computed(item, outcome)
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
