"""BLAS on one thread, for as long as anybody needs it so.

Each of our threads calls BLAS for itself; threads of its own would only be in the way, and sums
that are divided among them come out differently.

Where BLAS has one pool of threads, the limit is the process's, and threadpoolctl lets only the
thread that set it take it away. So a thread of its own holds it, from the first who needs it to
the last one. Where BLAS has a pool for each thread (OpenMP), every thread sets its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from threading import Event, Lock, Thread
from typing import Final

__all__ = ["blas_in_use", "single_threaded_blas"]

OPENMP_VARIABLE: Final = "KMP_DUPLICATE_LIB_OK"
_lock = Lock()
_users = 0
_keeper: _Keeper | None = None


class _Keeper:
    """The thread that holds the limit of the process."""

    def __init__(self) -> None:
        self._is_held, self._is_over = Event(), Event()
        self._thread = Thread(target=self._hold, name="loratool-blas", daemon=True)
        self._thread.start()
        self._is_held.wait()

    def _hold(self) -> None:
        try:
            with _limit():
                self._is_held.set()
                self._is_over.wait()
        finally:
            self._is_held.set()

    def release(self) -> None:
        self._is_over.set()
        self._thread.join()


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Hold every BLAS library that is loaded to one thread; for each thread that calls it."""
    global _users, _keeper
    import numpy as np  # noqa: F401 - so that its library is loaded

    with _lock:
        if not _users:
            _keeper = _Keeper()
        _users += 1
    try:
        with _limit():
            yield
    finally:
        with _lock:
            _users -= 1
            if not _users and _keeper is not None:
                _keeper.release()
                _keeper = None


@cache
def blas_in_use() -> dict[str, str]:
    """Return which BLAS numpy calls (``blas``), and for which kind of processor (``core``).

    Sums of others differ in the last bits.
    """
    import numpy as np  # noqa: F401 - so that its library is loaded

    with _quiet_import():
        from threadpoolctl import threadpool_info
    found = [each for each in threadpool_info() if each.get("user_api") == "blas"]
    names = sorted({f"{each.get('internal_api')} {each.get('version')}" for each in found})
    cores = sorted({str(each.get("architecture")) for each in found})
    return {"blas": ", ".join(names), "core": ", ".join(cores)}


def _limit() -> AbstractContextManager[object]:
    """Limit what this thread may limit."""
    with _quiet_import():
        from threadpoolctl import threadpool_limits
    limit: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limit


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Leave the environment as it is.

    threadpoolctl sets a variable on import, for a fault of Intel's OpenMP.
    """
    is_set = OPENMP_VARIABLE in os.environ
    yield
    if not is_set:
        os.environ.pop(OPENMP_VARIABLE, None)
