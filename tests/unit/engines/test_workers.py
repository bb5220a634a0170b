"""Processes that carry out calls: what they return, how they fail, how they end."""

from __future__ import annotations

import math
import operator
import os
import signal
import time
from concurrent.futures import CancelledError, wait

import pytest

from loratool.engines.workers import WorkerDiedError, Workers
from loratool.errors import OptionError


def test_calls_return_and_processes_are_used_again() -> None:
    with Workers(2) as workers:
        assert list(workers.map(math.sqrt, range(9))) == [math.sqrt(n) for n in range(9)]
        assert len({workers.submit(os.getpid).result() for _ in range(9)} | {os.getpid()}) <= 3
        assert workers.submit(os.getpid).result() != os.getpid()


def test_what_a_call_raises_comes_back() -> None:
    with Workers(1) as workers:
        with pytest.raises(ZeroDivisionError):
            workers.submit(operator.truediv, 1, 0).result()
        error = OptionError("a", "b", hint="c")
        found = workers.submit(_reraised, error).exception()
        assert isinstance(found, OptionError) and (found.where, found.hint) == ("a", "c")
        assert workers.submit(abs, -1).result() == 1


def _reraised(error: Exception) -> None:
    raise error


def test_a_dead_process_fails_the_call_that_it_was_at_and_no_other() -> None:
    with Workers(2) as workers:
        futures = [workers.submit(time.sleep, 0.02) for _ in range(5)]
        dead = workers.submit(signal.raise_signal, signal.SIGKILL)
        futures += [workers.submit(time.sleep, 0.02) for _ in range(5)]
        wait([*futures, dead])
        assert all(future.exception() is None for future in futures)
        error = dead.exception()
        assert isinstance(error, WorkerDiedError)
        assert error.status == -signal.SIGKILL and "SIGKILL" in str(error)
        assert "memory" in str(error)
        assert isinstance(workers.submit(os._exit, 7).exception(), WorkerDiedError)
        assert workers.submit(abs, -1).result() == 1


def test_blas_has_one_thread_there() -> None:
    with Workers(1) as workers:
        assert workers.submit(os.getenv, "OPENBLAS_NUM_THREADS").result() == "1"


def test_an_interruption_does_not_reach_them() -> None:
    with Workers(1) as workers:
        number = workers.submit(os.getpid).result()
        future = workers.submit(time.sleep, 0.3)
        time.sleep(0.1)
        os.kill(number, signal.SIGINT)
        assert future.result() is None


def test_they_end_at_once_when_they_are_told_to() -> None:
    workers = Workers(2)
    numbers = {workers.submit(os.getpid).result()}
    futures = [workers.submit(time.sleep, 60) for _ in range(5)]
    time.sleep(0.2)
    begun = time.monotonic()
    workers.terminate()
    assert time.monotonic() - begun < 5
    for future in futures:
        with pytest.raises((WorkerDiedError, CancelledError)):
            future.result(timeout=1)
    for number in numbers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
    with pytest.raises(RuntimeError):
        workers.submit(abs, 1)
