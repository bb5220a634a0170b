"""Import torch so that a signal can neither be lost in it nor bring it down."""

from __future__ import annotations

import signal
import threading

__all__ = ["import_torch"]


def import_torch() -> None:
    """Import torch with interruptions held back until it is done.

    An exception that a signal handler raises inside an import may be caught by it, or leave
    half of a library behind.
    """
    if threading.current_thread() is not threading.main_thread():
        import torch

        return
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        import torch  # noqa: F401 - to have it done
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
