"""A divided command: what its options say is done of a job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from loratool.errors import OutputError
from loratool.shards.course import ShareReport, do_share
from loratool.shards.division import Division
from loratool.shards.folder import PartsFolder
from loratool.shards.job import Job, Settings
from loratool.shards.records import all_records, wait_for_parts

__all__ = ["NO_PARTS", "do_parts", "records_of"]

Progress = Callable[[int, int], None]
Result = TypeVar("Result")
NO_PARTS = "there are no parts to finish"


def do_parts(
    job: Job,
    division: Division,
    settings: Settings,
    finish: Callable[[], Result],
    progress: Progress | None,
) -> Result | ShareReport:
    """Do what the options say of a job, and finish it where they say that.

    Raises:
        LoratoolError: A part cannot be done; what is done stays.
    """
    PartsFolder(job.output).begin(job.document)
    if division.share is None:
        from loratool.shards.engine import do_all

        do_all(job, division.executor, settings, progress=progress)
        return finish()
    share = do_share(job, division.share, settings, waits=division.waits, progress=progress)
    if not division.finishes or (share.left and not division.waits):
        return share
    return finish()


def records_of(
    folder: PartsFolder, verb: str, *, waits: bool, progress: Progress | None
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Return the plan in a folder, and the records of all parts.

    Args:
        folder: The folder.
        verb: The command that it is to be of.
        waits: Whether to wait for parts that are missing.
        progress: Called with bytes done and bytes in all.

    Returns:
        ``None`` where another process has finished meanwhile.

    Raises:
        OutputError: There are none, parts are missing, or they are of another command.
    """
    if not folder.plan_path.exists():
        raise OutputError(
            folder.path, NO_PARTS, hint="the same command with --shards auto makes them"
        )
    document = folder.plan()
    if document.get("verb") != verb:
        raise OutputError(folder.path, f"holds parts of {document.get('verb')!r:.30}")
    if waits:
        wait_for_parts(folder, document, progress)
        if not folder.plan_path.exists():
            return None
    return document, all_records(folder, document)
