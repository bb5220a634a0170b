"""Carry out the plan of an adapter: bytes that only move are moved, the rest is computed.

A plan that changes names alone is a copy, and the hashes that go into metadata are taken while
the bytes are still in the system's cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from loratool.files.atomic import check_output, staged, sync_file
from loratool.files.spec import StoredTensor
from loratool.files.transfer import read_into
from loratool.plan.adapter import AdapterPlan
from loratool.plan.history import digest_of
from loratool.plan.lanes import Spot, Task
from loratool.plan.module_error import Outcome
from loratool.plan.run import FileWork, NullSink, run_files, write_files
from loratool.plan.sidecar import write_sidecar
from loratool.plan.tasks import ModuleTask, OutputTask, ReportTask

__all__ = ["measure_adapter", "write_adapter"]

Progress = Callable[[int, int], None]
SYNC_BELOW: Final = 64 << 20


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
    is_synced = plan.nbytes < SYNC_BELOW
    outcome = Outcome()
    with staged(output, folder=plan.is_folder, force=force, sync=is_synced) as place:
        weights = place / plan.weights_name if plan.is_folder else place
        work = _work(plan, outcome)
        with ThreadPoolExecutor(1) as pool:
            # Inputs are hashed while they are converted; there is room for the hashes.
            digests = [pool.submit(digest_of, path) if path else None for path in _hashed(plan)]
            write_files([work], [weights], plan.stamps, threads=threads, progress=progress)
            _seal(plan, weights, [_result(digest) for digest in digests])
        if is_synced:
            sync_file(weights)
        if plan.is_folder:
            for sidecar in plan.sidecars:
                write_sidecar(sidecar, place)
            if plan.config is not None:
                (place / plan.config_name).write_bytes(plan.config_text)
    return outcome


def measure_adapter(
    plan: AdapterPlan, *, threads: int | None = None, progress: Progress | None = None
) -> Outcome:
    """Compute what would be written, and its errors, without writing."""
    outcome = Outcome()
    work = _work(plan, outcome)
    run_files([work], NullSink(), plan.stamps, threads=threads, progress=progress)
    return outcome


def _work(plan: AdapterPlan, outcome: Outcome) -> FileWork:
    """Return what is to be done for the weights file."""
    places = plan.layout.offsets
    spots = {spec.name: Spot(spec, 0, places[spec.name]) for spec in plan.specs}
    moves: dict[str, StoredTensor] = {}
    tasks: list[Task] = []
    for item in plan.parts:
        outputs = [output for _, output in item.outputs()]
        if not item.is_moved:
            tasks.append(ModuleTask(item, spots, outcome))
        for output in outputs:
            if output.moved is not None and output.moved.strides is None:
                moves[output.spec.name] = output.moved
            elif item.is_moved:
                tasks.append(OutputTask(output, spots[output.spec.name]))
        if item.alpha is not None:
            tasks.append(OutputTask(item.alpha, spots[item.alpha.spec.name]))
    for output in plan.carried:
        if output.moved is not None and output.moved.strides is None:
            moves[output.spec.name] = output.moved
        else:
            tasks.append(OutputTask(output, spots[output.spec.name]))
    tasks += [ReportTask(each, outcome) for each in plan.measured]
    in_order = [(spots[spec.name], moves[spec.name]) for spec in plan.specs if spec.name in moves]
    return FileWork(plan.weights_name, plan.nbytes, b"", in_order, tasks)


def _hashed(plan: AdapterPlan) -> list[Path | None]:
    return [source.weights for source in plan.history.inputs] if plan.history is not None else []


def _result(digest: Future[str] | None) -> str | None:
    return digest.result() if digest is not None else None


def _seal(plan: AdapterPlan, weights: Path, digests: Sequence[str | None]) -> None:
    """Write what can be said only once all data is there: what surrounds it, hashes in it."""
    descriptor = os.open(weights, os.O_RDWR | os.O_CLOEXEC)
    try:
        sealed = _sealed(plan, descriptor, weights)
        plan.layout.seal(descriptor, plan.metadata_with(sealed, digests), path=weights)
    finally:
        os.close(descriptor)


def _sealed(plan: AdapterPlan, descriptor: int, path: Path) -> Mapping[str, str]:
    """Return the metadata that only the data tells, now that it is written."""
    if plan.seal is None:
        return {}
    size = plan.layout.size
    start = min(plan.layout.offsets.values(), default=size)

    def read(offset: int, into: memoryview) -> None:
        read_into(descriptor, into, start + offset, path=path)

    return plan.seal.close(read, size - start, plan.specs, plan.metadata)
