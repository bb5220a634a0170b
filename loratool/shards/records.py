"""What is there of the parts of an output: their records, which of them are missing, and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from loratool.errors import LoratoolError, OutputError
from loratool.shards.folder import PartsFolder

__all__ = [
    "all_records",
    "differing_workers",
    "missing_parts",
    "wait_for_begin",
    "wait_for_parts",
]

Progress = Callable[[int, int], None]
POLL: Final = 1.0
SHOWN: Final = 4
DECIDING: Final = {
    "blas": "BLAS libraries",
    "core": "kinds of processor for that library",
    "processor": "processors",
    "device": "devices",
}
"""What decides about the last bits of sums, in the records of parts."""


def missing_parts(folder: PartsFolder, document: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the parts that are not done."""
    numbers = range(1, len(document["parts"]) + 1)
    return [n for n in numbers if folder.record(n, document["digest"]) is None]


def all_records(folder: PartsFolder, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the records of all parts.

    Raises:
        OutputError: Some are missing.
    """
    numbers = range(1, len(document["parts"]) + 1)
    found = {n: folder.record(n, document["digest"]) for n in numbers}
    missing = [n for n, record in found.items() if record is None]
    if missing:
        raise _missing(folder, document, missing)
    return [record for record in found.values() if record is not None]


def _missing(
    folder: PartsFolder, document: Mapping[str, Any], missing: Sequence[int]
) -> LoratoolError:
    parts = document["parts"]
    names = ", ".join(f"{parts[n - 1][0]}" for n in missing[:SHOWN])
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    failure = next((f for n in missing if (f := folder.failure(n)) is not None), None)
    what = f"{len(missing)} of {len(parts)} parts are missing: {names}{more}"
    if failure is not None:
        error = failure.get("error") or {}
        what += f"; one failed: {error.get('where')}: {error.get('message')}"
    return OutputError(
        folder.path, what, hint="the same command with --shards auto does what is missing"
    )


def wait_for_begin(folder: PartsFolder, *, makes_output: bool = True) -> None:
    """Wait until somebody has begun with the parts of an output, or has finished it.

    Args:
        folder: Where they come together.
        makes_output: Whether that there is an output says that it is finished.
    """
    while not folder.plan_path.exists() and not (makes_output and folder.output.exists()):
        time.sleep(POLL)


def wait_for_parts(
    folder: PartsFolder, document: Mapping[str, Any], progress: Progress | None = None
) -> None:
    """Wait until all parts are done, by whomever.

    Raises:
        OutputError: One has failed.
    """
    sizes = [size for _, size in document["parts"]]
    while missing := missing_parts(folder, document):
        if any(folder.failure(n) is not None for n in missing):
            raise _missing(folder, document, missing)
        if not folder.plan_path.exists():
            return  # another has finished
        if progress is not None:
            claims = [folder.claimed(n) for n in missing]
            running = sum(claim.done for claim in claims if claim is not None)
            left = sum(sizes[n - 1] for n in missing)
            progress(min(sum(sizes), sum(sizes) - left + running), sum(sizes))
        time.sleep(POLL)


def differing_workers(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a note where parts were made in ways that differ in the last bits."""
    found = {
        words: sorted({str(record.get(name)) for record in records})
        for name, words in DECIDING.items()
    }
    differing = [f"{words} ({', '.join(each)})" for words, each in found.items() if len(each) > 1]
    if not differing:
        return []
    return [
        f"parts were made by different {'; '.join(differing)}: the last bits of sums may differ "
        "from those of a single run"
    ]
