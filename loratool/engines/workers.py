"""Processes that carry out calls one after the other, as an executor.

Each is started once, with an interpreter of its own, and one BLAS thread. What ends it fails the
one call that it was at, which is known exactly; another takes its place.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Final

from loratool.engines.engine import Engine
from loratool.engines.names import EngineName

__all__ = ["WorkerDiedError", "Workers", "engine", "serve"]

BLAS_THREADS: Final = (
    "OPENBLAS_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
)
GARBAGE: Final = 100_000
"""Objects between two searches for cycles; see the command line, which does the same."""
PATIENCE: Final = 5.0
"""Seconds that a process has to clean up before it is killed."""
AHEAD: Final = 4
"""Calls that wait for each process."""
START: Final = """\
import sys
sys.path[:] = {path!r}
from loratool.engines.workers import serve
serve({number})
"""


class WorkerDiedError(Exception):
    """The process that was at a call has ended.

    Args:
        status: How: a signal as a negative number, or an exit status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status

    def __str__(self) -> str:
        if self.status >= 0:
            return f"its process ended with status {self.status}"
        number = -self.status
        name = {each.value: each.name for each in signal.Signals}.get(number, f"signal {number}")
        why = ", as the system does where memory is short" if number == signal.SIGKILL else ""
        return f"its process was ended by {name}{why}"


@dataclass
class _Call:
    """A call that waits for a process."""

    future: Future[Any]
    what: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class _Process:
    """An interpreter at the other end of a pipe."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, **dict.fromkeys(BLAS_THREADS, "1")}
        number = theirs.fileno()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START.format(path=sys.path, number=number)],
                env=environment,
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # what interrupts us does not interrupt it
            )
        finally:
            theirs.close()
        self.pipe = Connection(ours.detach())

    def call(self, call: _Call) -> None:
        """Carry out a call.

        Raises:
            WorkerDiedError: The process has ended.
        """
        try:
            self.pipe.send(call.what)
            is_good, value = self.pipe.recv()
        except (EOFError, OSError):
            raise WorkerDiedError(self.end()) from None
        if is_good:
            call.future.set_result(value)
        else:
            call.future.set_exception(value)

    def end(self, *, at_once: bool = False) -> int:
        """Wait until the process has ended, and return how."""
        if at_once:
            with suppress(OSError):
                self.process.terminate()
        else:
            self.pipe.close()  # which tells it to
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Workers(Executor):
    """Calls in processes of their own.

    Args:
        count: How many processes; they are started as they are needed.
    """

    def __init__(self, count: int) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._processes: dict[int, _Process] = {}
        self._is_over = False
        self._lock = threading.Lock()
        self._count = count
        self._threads: list[threading.Thread] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a call carried out.

        Raises:
            RuntimeError: The processes are shut down.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._is_over:
                raise RuntimeError("no calls are taken any more")
            self._calls.put(_Call(future, (fn, args, kwargs)))
            if len(self._threads) < self._count:
                number = len(self._threads)
                thread = threading.Thread(target=self._serve, args=(number,), daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def _serve(self, number: int) -> None:
        """Hand calls to one process, and to another where it has ended."""
        while (call := self._calls.get()) is not None:
            if not call.future.set_running_or_notify_cancel():
                continue
            try:
                with self._lock:
                    if self._is_over:
                        raise WorkerDiedError(-signal.SIGTERM)
                    process = self._processes.get(number)
                    if process is None:
                        process = self._processes[number] = _Process()
                process.call(call)
            except BaseException as error:
                if isinstance(error, WorkerDiedError):
                    self._processes.pop(number, None)
                if not call.future.done():
                    call.future.set_exception(error)
        process = self._processes.pop(number, None)
        if process is not None:
            process.end()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no calls any more; see :class:`Executor`."""
        with self._lock:
            self._is_over = self._is_over or cancel_futures
        if cancel_futures:
            while not self._calls.empty():
                call = self._calls.get()
                if call is not None:
                    call.future.cancel()
        for _ in self._threads:
            self._calls.put(None)
        if wait:
            for thread in self._threads:
                thread.join()
        self._is_over = True

    def terminate(self) -> None:
        """End all processes now; what they were at cleans up behind itself and fails."""
        with self._lock:
            self._is_over = True
            processes = list(self._processes.values())
        for process in processes:
            with suppress(OSError):
                process.process.terminate()
        for process in processes:
            process.end(at_once=True)
        self.shutdown(cancel_futures=True)


def engine(name: EngineName) -> Engine:
    """Return processes of our own, as many as a name says; none of them is started yet."""
    count = name.count or len(os.sched_getaffinity(0))
    return Engine(name.kind, make=lambda: Workers(count), end=_end, most=AHEAD * count)


def _end(executor: Executor, is_over: bool) -> None:
    assert isinstance(executor, Workers)
    if is_over:
        executor.terminate()
    else:
        executor.shutdown()


def serve(number: int) -> None:
    """Carry out calls that come through a pipe, in the process at its other end.

    Args:
        number: The descriptor of the pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    gc.set_threshold(GARBAGE)
    pipe = Connection(number)
    while True:
        try:
            call, args, kwargs = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = (True, call(*args, **kwargs))
        except Exception as error:
            result = (False, error)
        try:
            pipe.send(result)
        except (EOFError, OSError):
            return
        except Exception as error:  # what cannot be sent is told in words
            pipe.send((False, RuntimeError(f"{type(error).__name__}: {error}")))


def _stop(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one would stop the cleaning up
    raise SystemExit(128 + number)
