"""A divided command: what its options say is done of a job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from loratool.errors import OptionError, OutputError
from loratool.files.places import is_elsewhere
from loratool.files.targets import target_of
from loratool.shards.course import ShareReport, do_share
from loratool.shards.division import Division
from loratool.shards.folder import PartsFolder
from loratool.shards.job import Job, Settings
from loratool.shards.records import all_records, wait_for_parts

__all__ = ["check_on_disk", "do_parts", "no_parts", "records_of", "told_by"]

Progress = Callable[[int, int], None]
Result = TypeVar("Result")
ELSEWHERE = "was finished by another process, which tells of it"


def check_on_disk(output: Path) -> None:
    """Make sure that parts of an output have a folder to come together in.

    Raises:
        OptionError: It is in a store, or on the hub.
    """
    if target_of(output) is not None or is_elsewhere(output):
        raise OptionError(
            "--shards, --finish, --resume and --executor",
            "parts come together beside the output, and that is on no disk",
            hint="name a folder that all workers reach, and copy the result",
        )


def do_parts(
    job: Job,
    division: Division,
    settings: Settings,
    finish: Callable[[], Result | None],
    progress: Progress | None,
    *,
    replaces: bool = True,
) -> Result | ShareReport:
    """Do what the options say of a job, and finish it where they say that.

    Args:
        job: The job.
        division: What the options say.
        settings: How parts are done.
        finish: Puts the parts together, or finds out that somebody else has; ``None`` where
            only they know what came of it.
        progress: Called with bytes done and bytes in all.
        replaces: Whether there may be something in the place of the output.

    Raises:
        LoratoolError: A part cannot be done; what is done stays.
    """
    folder = PartsFolder(job.output)

    def begin() -> bool:
        """Make or find the folder, unless somebody has finished a moment ago."""
        if folder.begin(job.document) and not replaces and folder.output.exists():
            folder.remove()
            return False
        return True

    if division.share is None:
        from loratool.shards.engine import do_all

        do_all(job, division.executor, settings, begin, progress=progress)
        return told_by(finish, folder)
    if not begin():
        return told_by(finish, folder)
    share = do_share(job, division.share, settings, waits=division.waits, progress=progress)
    if not division.finishes or (share.left and not division.waits):
        return share
    result = finish()
    if result is None:
        return replace(share, notes=(*share.notes, f"{folder.path} {ELSEWHERE}"))
    return result


def told_by(finish: Callable[[], Result | None], folder: PartsFolder) -> Result:
    """Return what finishing returns.

    Raises:
        OutputError: Another process has finished, and only that one knows what came of it.
    """
    result = finish()
    if result is None:
        raise OutputError(folder.path, ELSEWHERE)
    return result


def no_parts(folder: PartsFolder) -> OutputError:
    """Return the error that there is nothing to finish."""
    hint = "the same command with --shards auto makes them"
    return OutputError(folder.path, "there are no parts to finish", hint=hint)


def records_of(
    folder: PartsFolder, verb: str, *, waits: bool = False, progress: Progress | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the plan in a folder, and the records of all parts.

    Args:
        folder: The folder.
        verb: The command that it is to be of.
        waits: Whether to wait for parts that are missing, or until another process has finished;
            then there may be no records.
        progress: Called with bytes done and bytes in all.

    Raises:
        OutputError: There are none, parts are missing, or they are of another command.
    """
    if not folder.plan_path.exists():
        raise no_parts(folder)
    document = folder.plan()
    if document.get("verb") != verb:
        raise OutputError(folder.path, f"holds parts of {document.get('verb')!r:.30}")
    if waits:
        wait_for_parts(folder, document, progress)
    if not folder.plan_path.exists():
        return document, []
    return document, all_records(folder, document)
