"""The hashes of inputs as work among other work, while the bytes are in the system's cache."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.files.sources import size_of
from loratool.files.spec import StoredTensor
from loratool.plan.history import History, digest_of
from loratool.plan.lanes import Spot, Task, Unit
from loratool.plan.outcome import Outcome

if TYPE_CHECKING:
    from loratool.plan.run import Run

__all__ = ["WholeTask", "digest_tasks"]


class WholeTask:
    """A task of one unit."""

    def __init__(self) -> None:
        self._is_free = threading.Lock()

    @property
    def written(self) -> Iterable[Spot]:
        """Nothing, but for the tasks of an adapter, which is written on the disk first."""
        return ()

    def reads(self) -> Iterable[StoredTensor]:
        """Return nothing: what is small is read when it is needed."""
        return ()

    def prepare(self) -> None:
        """Do nothing: what is needed is loaded by then."""

    def take(self, run: Run) -> Unit | None:
        """Return the work, once."""
        return (lambda: self.do(run)) if self._is_free.acquire(blocking=False) else None

    def do(self, run: Run) -> None:
        """Do all of it."""
        raise NotImplementedError


class DigestTask(WholeTask):
    """The SHA-256 of an input, for the history."""

    nbytes = 0

    def __init__(self, path: Path, digests: dict[Path, str]) -> None:
        super().__init__()
        self.path = path
        self.effort = size_of(path)
        self.digests = digests

    def do(self, run: Run) -> None:
        self.digests[self.path] = digest_of(self.path)


def digest_tasks(history: History | None, outcome: Outcome) -> list[Task]:
    """Return what hashes the inputs of ``history``."""
    paths = history.hashed if history is not None else ()
    return [DigestTask(path, outcome.digests) for path in paths]
