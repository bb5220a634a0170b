"""Carry out the plan of an adapter: bytes that only move are moved, the rest is computed.

A plan that changes names alone is a copy, and the hashes that go into metadata are taken while
the bytes are still in the system's cache.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from loratool.adapter.config import CONFIG_NAME
from loratool.files.atomic import check_output, staged
from loratool.files.container import read_view
from loratool.files.gathering import Piece, gather
from loratool.files.inputs import InputFiles
from loratool.files.torch_zip import seal
from loratool.files.transfer import read_into, write_all
from loratool.plan.adapter import HASH_KEY, LEGACY_HASH_KEY, AdapterPlan, ModuleOutput, Output
from loratool.plan.history import digest_of
from loratool.plan.rounding import Outcome, computed
from loratool.plan.sidecar import write_sidecar
from loratool.plan.threads import in_parallel
from loratool.values.arrays import Rounded

__all__ = ["measure_adapter", "write_adapter"]

Progress = Callable[[int, int], None]
SYNC_BELOW: Final = 64 << 20
BLOCK: Final = 4 << 20
LEGACY_SPAN: Final = (0x100000, 0x110000)


def write_adapter(
    plan: AdapterPlan,
    output: Path,
    *,
    inputs: Sequence[Path],
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Write ``plan`` at ``output``, whole or not at all.

    Args:
        plan: What to write.
        output: Where.
        inputs: What the output may not touch.
        force: Replace an existing output.
        threads: Number of modules in work at a time.
        progress: Called with bytes done and bytes in all.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    check_output(output, force=force, inputs=[*inputs, *plan.inputs()], needed=plan.nbytes)
    files = InputFiles(plan.stamps)
    is_synced = plan.nbytes < SYNC_BELOW
    outcome = Outcome()
    try:
        with staged(output, folder=plan.is_folder, force=force, sync=is_synced) as place:
            for path in plan.stamps:
                files.descriptor(path)
            weights = place / plan.weights_name if plan.is_folder else place
            _save(plan, weights, files, outcome, threads, progress)
            files.check_unchanged()
            if plan.is_folder:
                for sidecar in plan.sidecars:
                    write_sidecar(sidecar, place)
                if plan.config is not None:
                    (place / CONFIG_NAME).write_bytes(plan.config_text)
    finally:
        files.close()
    return outcome


def measure_adapter(
    plan: AdapterPlan, *, threads: int | None = None, progress: Progress | None = None
) -> Outcome:
    """Compute what would be written, and its errors, without writing."""
    files = InputFiles(plan.stamps)
    outcome = Outcome()
    try:
        in_parallel(
            lambda item: computed(item, outcome),
            [item for item in plan.parts if not item.is_moved],
            threads=threads,
            progress=progress,
        )
        _measure_others(plan, outcome, threads)
        files.check_unchanged()
    finally:
        files.close()
    return outcome


def _measure_others(plan: AdapterPlan, outcome: Outcome, threads: int | None) -> None:
    found = in_parallel(lambda each: each.compute()[1], plan.measured, threads=threads)
    outcome.reports |= {
        each.name: report for each, report in zip(plan.measured, found, strict=True)
    }


class _Writer:
    """Writes tensors at their places; bytes that only move are collected and moved together."""

    def __init__(self, places: Mapping[str, int], descriptor: int, files: InputFiles) -> None:
        self.descriptor = descriptor
        self.files = files
        self.places = places
        self.pieces: list[Piece] = []

    def take(self, output: Output, made: Rounded | None = None) -> None:
        """Write a tensor, or note which bytes are to be moved for it."""
        spec, place = output.spec, self.places[output.spec.name]
        stored = output.moved
        if not spec.nbytes:
            return
        if made is None and stored is not None and stored.strides is None:
            self.pieces.append(Piece(place, spec.nbytes, stored.path, stored.offset))
        elif made is None and stored is not None:
            write_all(self.descriptor, read_view(stored), place)
        else:
            made = made or Rounded.of(output.value.evaluate(), spec.dtype)
            write_all(self.descriptor, made.bits.data.cast("B"), place)

    def flush(self) -> None:
        """Move everything that was collected."""
        gather(self.pieces, self.descriptor, self.files.descriptor)
        self.pieces = []


def _save(
    plan: AdapterPlan,
    weights: Path,
    files: InputFiles,
    outcome: Outcome,
    threads: int | None,
    progress: Progress | None,
) -> None:
    layout = plan.torch_layout if plan.is_torch else None
    size, places = (layout.size, layout.offsets) if layout else (plan.nbytes, plan.offsets())
    descriptor = os.open(weights, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, size)
        with ThreadPoolExecutor(1) as pool:
            # Inputs are hashed while they are converted; there is room for the hashes.
            digests = [pool.submit(digest_of, path) if path else None for path in _hashed(plan)]
            _write_all(plan, _Writer(places, descriptor, files), outcome, threads, progress)
            known = [_result(digest) for digest in digests]
        if layout is not None:
            seal(descriptor, layout, path=weights)
        else:
            hashes = _hashes(plan, descriptor, weights) if plan.is_hashed else {}
            write_all(descriptor, memoryview(plan.header_with(hashes, known)), 0)
        if size < SYNC_BELOW:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if progress is not None:
        progress(plan.nbytes, plan.nbytes)


def _hashed(plan: AdapterPlan) -> list[Path | None]:
    return [source.weights for source in plan.history.inputs] if plan.history is not None else []


def _result(digest: Future[str] | None) -> str | None:
    return digest.result() if digest is not None else None


def _write_all(
    plan: AdapterPlan,
    writer: _Writer,
    outcome: Outcome,
    threads: int | None,
    progress: Progress | None,
) -> None:
    def one(item: ModuleOutput) -> None:
        made = computed(item, outcome)
        for slot, output in item.outputs():
            writer.take(output, made.get(slot))

    for item in plan.parts:
        if item.is_moved:
            for _, output in item.outputs():
                writer.take(output)
        if item.alpha is not None:
            writer.take(item.alpha)
    for output in plan.carried:
        writer.take(output)
    work = [item for item in plan.parts if not item.is_moved]
    sizes = [sum(spec.nbytes for spec in item.specs.values()) for item in work]
    in_parallel(one, work, threads=threads, sizes=sizes, progress=progress)
    writer.flush()
    _measure_others(plan, outcome, threads)


def _hashes(plan: AdapterPlan, descriptor: int, path: Path) -> dict[str, str]:
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
