"""What calls are handed to: named, handed over or made, closed by whoever made it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest
from errands import square

from loratool.engines.engine import MOST_BREAKS, Engine, opened
from loratool.engines.workers import Workers
from loratool.errors import EngineError, OptionError


class Noted(ThreadPoolExecutor):
    """Threads that note how they are shut down, and may be broken."""

    def __init__(self) -> None:
        super().__init__(1)
        self.ends: list[tuple[bool, bool]] = []
        self.error: Exception | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.error is not None:
            raise self.error
        return super().submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.ends.append((wait, cancel_futures))
        super().shutdown(wait, cancel_futures=cancel_futures)


def test_an_executor_that_was_handed_over_stays_open() -> None:
    with Noted() as threads:
        with opened(threads) as engine:
            assert engine.submit(square, 3).result() == 9
        assert threads.ends == [] and threads.submit(square, 2).result() == 4


def test_one_that_was_made_is_closed() -> None:
    made: list[Noted] = []

    def make() -> Executor:
        made.append(Noted())
        return made[-1]

    with opened(make) as engine:
        assert engine.submit(square, 3).result() == 9
    assert [each.ends for each in made] == [[(True, False)]]
    with pytest.raises(ZeroDivisionError), opened(make):
        raise ZeroDivisionError
    assert made[-1].ends == [(False, True)]


def test_an_older_executor_knows_nothing_of_cancelling() -> None:
    class Old(Noted):
        def shutdown(self, wait: bool = True) -> None:  # type: ignore[override]
            super().shutdown(wait)

    with opened(Old) as engine:
        assert engine.submit(square, 3).result() == 9


@pytest.mark.parametrize(
    "error", [BrokenExecutor("why"), RuntimeError("cannot schedule new futures"), OSError(32, "x")]
)
def test_a_broken_one_is_replaced_if_somebody_makes_another(error: Exception) -> None:
    made: list[Noted] = []

    def make() -> Executor:
        made.append(Noted())
        return made[-1]

    with opened(make) as engine:
        made[0].error = error
        assert engine.submit(square, 4).result() == 16
        assert len(made) == 2 and made[0].ends
    with Noted() as threads, opened(threads) as engine:
        threads.error = error
        with pytest.raises(EngineError, match="takes no calls") as failure:
            engine.submit(square, 4)
    assert failure.value.hint and "executor=" in failure.value.hint


def test_what_is_wrong_with_a_call_breaks_no_executor() -> None:
    with Noted() as threads, opened(threads) as engine:
        threads.error = TypeError("cannot be sent")
        with pytest.raises(TypeError):
            engine.submit(square, 4)


def test_what_breaks_over_and_over_is_given_up() -> None:
    made: list[Noted] = []

    def make() -> Executor:
        made.append(Noted())
        return made[-1]

    def try_it(engine: Engine) -> None:
        while len(made) < 100:
            made[-1].error = BrokenExecutor("at its start")
            engine.submit(square, 2)

    with opened(make) as engine, pytest.raises(EngineError, match="at its start"):
        try_it(engine)
    assert len(made) == MOST_BREAKS + 1


def test_what_is_no_executor_is_said() -> None:
    for what in (3, int, lambda: "threads"):
        with pytest.raises(OptionError, match="Executor"), opened(what):  # type: ignore[arg-type]
            pass
    with pytest.raises(OptionError, match="none of"), opened("proceses"):
        pass


@pytest.mark.parametrize("what", [None, "processes", "processes:3"])
def test_processes_have_a_name(what: str | None) -> None:
    with opened(what) as engine:
        count = 3 if what == "processes:3" else len(os.sched_getaffinity(0))
        assert engine.most == 4 * count
        assert engine.submit(os.getpid).result() != os.getpid()
        workers = engine.executor
        assert isinstance(workers, Workers)
    with pytest.raises(RuntimeError):
        workers.submit(square, 2)


def test_pools_of_many_workers_are_kept_busy() -> None:
    with ThreadPoolExecutor(100) as threads, opened(threads) as engine:
        assert engine.most == 101
    assert Engine("one").most == 64
