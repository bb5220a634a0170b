"""Whole files of the hub, fetched into its cache by its own library, and left off when asked to."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

from loratool.files.hub.cache import cache_folder
from loratool.files.hub.names import endpoint
from loratool.files.sources import AT_ONCE

__all__ = ["download"]

GRACE: Final = 3.0
"""Seconds that files in work are given to end in, once nobody wants them any more."""


class _LeftOffError(Exception):
    """Nobody wants the files any more."""


def download(repo: str, commit: str, paths: Sequence[str]) -> None:
    """Fetch files of a commit, several at a time.

    It is done by a thread, so that a signal need not wait for gigabytes: files in work end with
    the next block, and leave nothing behind.

    Raises:
        Exception: What the hub's library raises.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # not listed, but public

    is_left_off = threading.Event()
    failures: list[BaseException] = []

    class Bar(tqdm):
        """The bar of the hub's library, which every block of every file goes through."""

        def update(self, n: float | None = 1) -> Any:
            if is_left_off.is_set():
                raise _LeftOffError
            return super().update(n)

    def fetch() -> None:
        try:
            snapshot_download(
                repo,
                revision=commit,
                cache_dir=cache_folder(),
                allow_patterns=[_escaped(path) for path in paths],
                endpoint=endpoint(),
                max_workers=AT_ONCE,
                tqdm_class=Bar,
            )
        except BaseException as error:  # told by the thread that waits
            failures.append(error)

    worker = threading.Thread(target=fetch, name="loratool-fetch", daemon=True)
    worker.start()
    try:
        while worker.is_alive():
            worker.join(0.1)
    except BaseException:
        is_left_off.set()
        worker.join(GRACE)
        raise
    if failures:
        raise failures[0]


def _escaped(path: str) -> str:
    """Return the pattern that only this path matches."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in path)
