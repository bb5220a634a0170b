"""BLAS on one thread, for as long as anybody needs it so.

Each of our threads calls BLAS for itself; threads of its own would only be in the way, and sums
that are divided among them come out differently. The limit is the process's, so it is counted:
the first who needs it sets it, the last one takes it away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

__all__ = ["single_threaded_blas"]

_lock = Lock()
_users = 0
_limits: Any = None


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Hold every BLAS library that is loaded to one thread."""
    global _users, _limits
    with _lock:
        if not _users:
            import numpy as np  # noqa: F401 - so that its library is loaded
            from threadpoolctl import threadpool_limits

            _limits = threadpool_limits(limits=1, user_api="blas")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _limits.restore_original_limits()
                _limits = None
