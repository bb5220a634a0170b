"""Calls on their way: each is handed over once, whatever becomes of executors and messages."""

from __future__ import annotations

import multiprocessing
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import errands
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.engines import course
from loratool.engines.course import RETRIES, Call, Found, follow
from loratool.engines.engine import opened
from loratool.engines.workers import WorkerDiedError
from loratool.errors import EngineError, OptionError


class Taken(dict[Any, tuple[Any, int]]):
    """What was handed over, once for each key."""

    def __call__(self, key: Any, what: Any, attempt: int, seconds: float) -> None:
        assert key not in self and seconds >= 0
        self[key] = (what, attempt)


def squares(count: int) -> list[Call]:
    return [Call(number, errands.square, (number,)) for number in range(count)]


def is_squared(taken: Taken, count: int) -> bool:
    return {key: what for key, (what, _) in taken.items()} == {n: n * n for n in range(count)}


def spawned() -> Executor:
    return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))


def test_calls_are_asked_for_as_they_are_taken() -> None:
    asked = []

    def calls() -> Iterator[Call]:
        for call in squares(500):
            asked.append(call.key)
            yield call

    def take(key: int, what: int, attempt: int, seconds: float) -> None:
        taken(key, what, attempt, seconds)
        assert len(asked) - len(taken) <= 64

    taken = Taken()
    with ThreadPoolExecutor(3) as threads, opened(threads) as engine:
        follow(engine, calls(), take)
    assert is_squared(taken, 500) and {attempt for _, attempt in taken.values()} == {1}


def test_a_reason_is_final_and_anything_else_is_tried_again(tmp_path: Path) -> None:
    calls = [
        Call("refuse", errands.refuse, (str(tmp_path / "refuse"),)),
        Call("twice", errands.fail, (str(tmp_path / "twice"), 2, ConnectionError("gone"), 5)),
        Call("always", errands.fail, (str(tmp_path / "always"), 99)),
        Call("exit", errands.fail, (str(tmp_path / "exit"), 1, SystemExit(1), 6)),
        *squares(5),
    ]
    taken = Taken()
    with ThreadPoolExecutor(2) as threads, opened(threads) as engine:
        follow(engine, calls, taken)
    assert isinstance(taken["refuse"][0], OptionError) and taken["refuse"][1] == 1
    assert errands.tries_of(tmp_path / "refuse") == 1
    assert taken["twice"] == (25, 3) and taken["exit"] == (36, 2)
    assert isinstance(taken["always"][0], MemoryError) and taken["always"][1] == RETRIES + 1
    assert errands.tries_of(tmp_path / "always") == RETRIES + 1
    assert all(taken[number] == (number * number, 1) for number in range(5))


def test_what_cannot_be_sent_is_the_fault_of_its_call() -> None:
    taken = Taken()
    with opened("processes:1") as engine:
        follow(engine, [Call("lock", errands.square, (threading.Lock(),)), *squares(2)], taken)
    assert isinstance(taken["lock"][0], TypeError) and taken[1] == (1, 1)


@pytest.mark.slow
def test_an_innocent_call_survives_whatever_breaks_its_pool(tmp_path: Path) -> None:
    calls: list[Call] = squares(40)
    for place in range(4):
        args = (str(tmp_path / f"once{place}"), 1, place)
        calls.insert(7 * place, Call(f"once{place}", errands.die, args))
    calls.insert(0, Call("always", errands.die, (str(tmp_path / "always"), 99)))
    taken = Taken()
    with opened(spawned) as engine:
        follow(engine, calls, taken)
    what, attempt = taken.pop("always")
    assert isinstance(what, BrokenProcessPool) and attempt == RETRIES + 1
    assert [taken.pop(f"once{place}")[0] for place in range(4)] == [0, 1, 4, 9]
    assert is_squared(taken, 40)


@pytest.mark.slow
def test_a_pool_that_stays_broken_ends_the_run_in_one_line(tmp_path: Path) -> None:
    calls = [*squares(3), Call("die", errands.die, (str(tmp_path / "die"), 99)), *squares(90)[3:]]
    taken = Taken()
    with pytest.raises(EngineError, match="takes no calls any more") as failure:  # noqa: SIM117
        with spawned() as pool, opened(pool) as engine:
            follow(engine, calls, taken)
    assert "\n" not in str(failure.value)


def test_a_killed_process_of_ours_costs_its_call_alone(tmp_path: Path) -> None:
    calls: list[Call] = squares(20)
    calls.insert(3, Call("once", errands.die, (str(tmp_path / "once"), 1, 7)))
    calls.insert(4, Call("always", errands.die, (str(tmp_path / "always"), 99)))
    taken = Taken()
    with opened("processes:2") as engine:
        follow(engine, calls, taken)
    what, attempt = taken.pop("always")
    assert isinstance(what, WorkerDiedError) and what.status == -signal.SIGKILL
    assert attempt == RETRIES + 1 and taken.pop("once") == (49, 2)
    assert is_squared(taken, 20) and {attempt for _, attempt in taken.values()} == {1}


class Lossy(Executor):
    """Carries out calls at once, or loses them in one of several ways, or does them twice.

    Args:
        seed: Of chance.
        ways: How calls get lost: ``cancelled``, ``raised``, ``broken``; ``silent`` ones are never
            heard of again, and ``mute`` ones are carried out, but nobody is told.
    """

    def __init__(self, seed: int, ways: tuple[str, ...]) -> None:
        self.random = random.Random(seed)
        self.ways = ways
        self.runs: dict[Any, int] = {}
        self.results: dict[Any, Any] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        way = self.random.choice(self.ways) if self.random.random() < 0.3 else None
        if way == "cancelled":
            future.cancel()  # and nobody is notified, as some do
        elif way in ("raised", "broken"):
            future.set_running_or_notify_cancel()
            future.set_exception(ConnectionError() if way == "raised" else BrokenExecutor())
        elif way != "silent":
            for _ in range(2 if self.random.random() < 0.3 else 1):
                result = fn(*args, **kwargs)
                self.results[args[-1]] = result
                self.runs[args[-1]] = self.runs.get(args[-1], 0) + 1
            if way != "mute":
                future.set_result(result)
        return future


@settings(deadline=None, max_examples=60)
@given(st.integers(), st.sets(st.sampled_from(["cancelled", "raised", "broken"]), min_size=1))
def test_every_call_is_heard_of_however_lossy_an_executor_is(seed: int, ways: set[str]) -> None:
    taken = Taken()
    with opened(Lossy(seed, tuple(sorted(ways)))) as engine:
        follow(engine, squares(100), taken)
    assert set(taken) == set(range(100))
    for key, (what, attempt) in taken.items():
        is_lost = isinstance(what, CancelledError | ConnectionError | BrokenExecutor)
        assert what == key * key or (is_lost and attempt == RETRIES + 1)
    assert len([what for what, _ in taken.values() if isinstance(what, Exception)]) <= 8


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let looks follow each other, so that nobody waits for the next."""
    monkeypatch.setattr(course, "PERIOD", 0.0)
    monkeypatch.setattr(course, "SHARE", 0)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("seed", range(10))
def test_files_are_believed_and_not_messages(seed: int) -> None:
    lossy = Lossy(seed, ("mute", "silent", "cancelled"))

    def look(key: int) -> Found | None:
        return Found(lossy.results[key]) if key in lossy.results else None

    taken = Taken()
    with opened(lossy) as engine:
        follow(engine, squares(100), taken, look, patience=0.0)
    lost = {key for key, (what, _) in taken.items() if isinstance(what, Exception)}
    assert lost == set(range(100)) - set(lossy.results) and len(lost) <= 8
    assert all(what == key * key for key, (what, _) in taken.items() if key not in lost)


def test_what_is_there_before_it_is_handed_out_is_not_done_again() -> None:
    def look(key: int) -> Found | None:
        return Found("there") if key % 2 else None

    lossy, taken = Lossy(0, ("raised",)), Taken()
    with opened(lossy) as engine:
        follow(engine, squares(40), taken, look)
    assert all(taken[n][0] == "there" for n in range(1, 40, 2))
    assert not set(lossy.runs) & set(range(1, 40, 2))


def test_a_result_that_was_found_ends_a_call_that_fails() -> None:
    there = {}

    def half(number: int) -> int:
        there[number] = number
        raise ConnectionError

    taken = Taken()
    with ThreadPoolExecutor(1) as threads, opened(threads) as engine:
        look = {3: lambda: Found("kept") if 3 in there else None}
        follow(engine, [Call(3, half, (3,))], taken, lambda key: look[key]())
    assert taken == {3: ("kept", 1)}


class Manual(Executor):
    """Takes calls and leaves it to the test to end them."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]


class Clock:
    """Time that passes when somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, _quick: None) -> Clock:
    found = Clock()
    monkeypatch.setattr(course, "monotonic", found)
    return found


def test_a_call_that_lives_is_waited_for(clock: Clock) -> None:
    """As long as its token changes; then it is handed out again, and the first result counts."""
    manual, taken = Manual(), Taken()

    def look(key: str) -> Any:
        clock.now += 100
        if clock.now == 6200:
            manual.futures[1].set_result("second")
        return min(clock.now, 5000.0)  # which grows no more from then on

    with opened(manual) as engine:
        follow(engine, [Call("a", errands.square, (1,))], taken, look)
    assert taken == {"a": ("second", 2)} and len(manual.futures) == 2
    assert manual.futures[0].cancelled()


def test_a_call_that_has_not_begun_waits_for_those_that_live(clock: Clock) -> None:
    manual, taken = Manual(), Taken()

    def look(key: str) -> Any:
        clock.now += 100
        if key == "queued":
            return None
        if clock.now > 20000 and not manual.futures[0].done():
            for future in manual.futures:
                future.set_result("ended")
        return clock.now

    calls = [Call(key, errands.square, (1,)) for key in ("long", "queued")]
    with opened(manual) as engine:
        follow(engine, calls, taken, look)
    assert taken == {"long": ("ended", 1), "queued": ("ended", 1)}
    assert len(manual.futures) == 2


def test_what_never_shows_a_sign_of_life_is_given_up(clock: Clock) -> None:
    manual, taken = Manual(), Taken()

    def look(key: str) -> None:
        clock.now += 100

    with opened(manual) as engine:
        follow(engine, [Call("a", errands.square, (1,))], taken, look, patience=1000)
    what, attempt = taken["a"]
    assert isinstance(what, TimeoutError) and "1000 s" in str(what)
    assert attempt == RETRIES + 1 == len(manual.futures)


def test_a_try_that_fails_leaves_it_to_the_other_that_is_out(clock: Clock) -> None:
    manual, taken = Manual(), Taken()

    def look(key: str) -> None:
        clock.now += 100
        if len(manual.futures) == 2 and not manual.futures[0].done():
            manual.futures[0].set_exception(ConnectionError())
        elif len(manual.futures) == 2 and clock.now > 2000:
            manual.futures[1].set_result(4)

    with opened(manual) as engine:
        follow(engine, [Call("a", errands.square, (1,))], taken, look, patience=1000)
    assert taken == {"a": (4, 2)} and len(manual.futures) == 2


def test_whoever_takes_results_may_end_everything() -> None:
    def take(key: int, what: Any, attempt: int, seconds: float) -> None:
        seen.append(key)
        if key == 3:
            raise OptionError("enough", "of it")

    seen: list[int] = []
    manual = Manual()

    def calls() -> Iterator[Call]:
        yield from squares(10)
        for future in manual.futures[3:6]:
            future.set_result(1)

    with pytest.raises(OptionError, match="enough"), opened(manual) as engine:
        follow(engine, calls(), take)
    assert seen == [3]
    assert all(future.cancelled() for future in manual.futures[:3] + manual.futures[6:])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interruption_takes_what_has_ended_well(stop: type[BaseException]) -> None:
    manual, taken = Manual(), Taken()

    def calls() -> Iterator[Call]:
        yield from squares(6)
        manual.futures[1].set_result(1)
        manual.futures[2].set_exception(ConnectionError())
        manual.futures[4].set_result(16)
        raise stop

    with pytest.raises(stop), opened(manual) as engine:
        follow(engine, calls(), taken)
    assert taken == {1: (1, 1), 4: (16, 1)}
    assert all(manual.futures[number].cancelled() for number in (0, 3, 5))


def test_an_interrupted_worker_interrupts_everything() -> None:
    manual = Manual()

    def calls() -> Iterator[Call]:
        yield from squares(2)
        manual.futures[1].set_exception(KeyboardInterrupt())

    with pytest.raises(KeyboardInterrupt), opened(manual) as engine:
        follow(engine, calls(), Taken())
    assert manual.futures[0].cancelled()
