"""Decompose every module, and keep what is done where it can be taken up again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError

from loratool.base.ties import have_same_values
from loratool.codecs.weights import stored_tensors
from loratool.errors import OptionError
from loratool.files.inputs import InputFiles
from loratool.math.extraction import Leading
from loratool.plan.threads import in_parallel
from loratool.verbs.extraction.difference import (
    BUDGET_RANK,
    Extracted,
    Lengths,
    Settings,
    decompose,
    extracted,
)
from loratool.verbs.extraction.pairs import Leftover, Target
from loratool.verbs.extraction.reading import change_of

__all__ = ["decompose_all", "leftover_changes", "open_spool", "spool_name"]

Progress = Callable[[int, int], None]
RUN_FILE: Final = "run.json"


def open_spool(folder: Path, key: dict[str, Any]) -> None:
    """Make sure that what ``folder`` holds, if anything, is of the same run.

    Raises:
        OptionError: It holds the modules of another run.
    """
    described = json.dumps(key, sort_keys=True)
    known = folder / RUN_FILE
    if known.is_file() and known.read_text("utf-8", "replace") not in (described, ""):
        raise OptionError(
            "--resume",
            f"{folder} holds modules of a run with other inputs or options",
            hint="give the same options, or delete that folder",
        )
    partial = known.with_suffix(".partial")
    partial.unlink(missing_ok=True)  # a link or a pipe that somebody has put there
    partial.write_text(described)
    partial.replace(known)


def decompose_all(
    targets: Sequence[Target],
    settings: Settings,
    files: InputFiles,
    spool: Path | None,
    *,
    progress: Progress | None,
    budget_ranks: Mapping[str, int] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Extracted]:
    """Decompose every target; those that ``spool`` has already are read from there.

    Args:
        targets: The modules.
        settings: How.
        files: Where to read.
        spool: Where factors are kept, if they are.
        progress: Called with how much is done and how much there is.
        budget_ranks: How many ranks to compute, by name; other targets are left out. By default
            the first look at all that a budget takes.
        numbers: Which of all modules each target is; by default they are all.
    """

    def one(item: tuple[int, Target]) -> Extracted:
        number, target = item
        rank = (budget_ranks or {}).get(target.name, BUDGET_RANK)
        if spool is None:
            return decompose(target, settings, files, rank)
        path = spool / spool_name(number)
        if path.is_file():
            try:
                known = _load(target.name, path, settings)
            except (SafetensorError, LookupError, ValueError, TypeError, OSError):
                path.unlink()  # a damaged file is computed again
            else:
                if budget_ranks is None or known.computed >= min(rank, target.smallest_side):
                    return known
        found = decompose(target, settings, files, rank)
        _save(path, found)
        return found

    numbered = [
        (number, target)
        for number, target in zip(numbers or range(len(targets)), targets, strict=True)
        if budget_ranks is None or target.name in budget_ranks
    ]
    # The largest first, so that no thread is left alone with one at the end.
    order = sorted(range(len(numbered)), key=lambda index: -numbered[index][1].nbytes)
    items = [numbered[index] for index in order]
    sizes = [target.nbytes for _, target in items]
    for _, target in items:
        read = (*stored_tensors(target.base), *stored_tensors(target.tuned))
        files.expect(*(extent for stored in read for extent in stored.extents))
    threads = settings.differences.threads
    found = in_parallel(one, items, threads=threads, progress=progress, sizes=sizes)
    by_place = dict(zip(order, found, strict=True))
    return [by_place[index] for index in range(len(numbered))]


def spool_name(number: int) -> str:
    """Return the name of the file that keeps a module."""
    return f"{number}.safetensors"


def _save(path: Path, module: Extracted) -> None:
    from safetensors.numpy import save_file

    tensors: dict[str, Any] = {"floor": np.array([module.floor])}
    for index, part in enumerate(module.parts):
        tensors[f"up.{index}"] = np.ascontiguousarray(part.up)
        tensors[f"down.{index}"] = np.ascontiguousarray(part.down)
        tensors[f"values.{index}"] = np.ascontiguousarray(part.singular_values)
        tensors[f"squares.{index}"] = np.array([part.squared_norm, part.squared_residual])
        tensors[f"exact.{index}"] = np.array([part.is_exact])
    if (lengths := module.lengths) is not None:
        tensors["magnitude"] = np.ascontiguousarray(lengths.magnitude)
        tensors["lengths"] = np.array(
            [lengths.squared_norm, lengths.squared_error, lengths.squared_plain]
        )
    partial = path.with_suffix(f".{os.getpid()}.{os.urandom(3).hex()}.partial")  # others may, too
    save_file(tensors, partial)
    partial.replace(path)


def _load(name: str, path: Path, settings: Settings) -> Extracted:
    from safetensors.numpy import load_file

    tensors = load_file(path)
    parts = []
    for index in range(sum(key.startswith("up.") for key in tensors)):
        norm, residual = tensors[f"squares.{index}"].tolist()
        up, down = tensors[f"up.{index}"], tensors[f"down.{index}"]
        values = tensors[f"values.{index}"]
        is_exact = bool(tensors[f"exact.{index}"][0])
        parts.append(Leading(up, down, values, norm, residual, is_exact))
    floor = float(tensors["floor"][0])
    if "magnitude" in tensors:
        lengths = Lengths(tensors["magnitude"], *tensors["lengths"].tolist())
        return Extracted(name, tuple(parts), floor, parts[0].up.shape[1], lengths)
    return extracted(name, parts, floor, settings)


def leftover_changes(
    leftovers: Sequence[Leftover], files: InputFiles, *, threads: int | None
) -> dict[str, float]:
    """Return ``‖tuned - base‖²`` of every leftover that has both, by name."""

    def one(item: Leftover) -> float | None:
        if item.base is None or item.tuned is None:
            return None
        if item.is_comparable:
            change = change_of(item.base, item.tuned, files)
            return change if math.isfinite(change) else None
        specs = (item.base.spec, item.tuned.spec)
        is_alike = len({(spec.dtype, spec.shape) for spec in specs}) == 1
        is_same = is_alike and have_same_values(item.base, item.tuned)
        return 0.0 if is_same else None

    found = in_parallel(one, leftovers, threads=threads)
    return {
        item.name: value for item, value in zip(leftovers, found, strict=True) if value is not None
    }
