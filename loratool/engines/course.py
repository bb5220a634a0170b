"""Calls on their way through an engine: handed out, waited for, tried again where they get lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, Final

from loratool.engines.engine import Engine
from loratool.errors import EngineError, LoratoolError

__all__ = ["PATIENCE", "RETRIES", "Call", "Found", "follow"]

RETRIES: Final = 3
"""How often a call is tried again that failed for no reason of its own."""
PATIENCE: Final = 600.0
"""Seconds without a sign of life after which a call counts as lost."""
PERIOD: Final = 1.0
"""Seconds between two looks at calls that are out."""
CHECKING: Final = 10.0
"""Seconds without any end after which an engine is asked whether there can be one."""
SHARE: Final = 10
"""A look at all of them may take one part in so many of the time."""


@dataclass(frozen=True, slots=True)
class Call:
    """What is to be carried out. It may be more than once, and elsewhere.

    Attributes:
        key: What tells it from others.
        function: What is called; it and its arguments are sent to another process.
        args: With what.
    """

    key: Hashable
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a call that was found by other means than its future.

    Attributes:
        result: What it returned.
    """

    result: Any


Take = Callable[[Any, Any, int, float], None]
Look = Callable[[Any], Any]


def follow(
    engine: Engine,
    calls: Iterable[Call],
    take: Take,
    look: Look | None = None,
    *,
    patience: float = PATIENCE,
) -> None:
    """Have calls carried out, and hand over what comes of them as they end.

    An error of loratool is what came of a call. Any other (its worker died, the connection was
    lost, memory was short) is nothing that it did: it is tried again, three times at most. Where
    executors break and take calls with them that had nothing to do with it, the last two tries of
    each are by themselves. However this ends, by an error of ``take`` or an interruption, calls
    that are out are given up, and what has ended well is handed over first.

    Args:
        engine: What carries them out.
        calls: The calls, each with another key; they are asked for as the engine takes them.
        take: Called with the key, the result or the error, at which attempt it was, and how many
            seconds that took, waiting included.
        look: Asked about a call by its key before it is handed out, while it is out, and before it
            is tried again. It returns :class:`Found` where it has been carried out, whatever became
            of the message; else something that changes while somebody works on it, or ``None``.
        patience: Seconds after which a call is handed out once more where ``look`` shows no change.
            One that has not begun is waited for as long as any other shows some.

    Raises:
        EngineError: The engine takes no calls any more.
    """
    course = _Course(engine, take, look, patience)
    try:
        course.run(iter(calls))
    except BaseException:
        engine.terminate()
        course.drain()
        raise


@dataclass(eq=False)
class _Out:
    """A call, and what is known of it.

    Attributes:
        call: The call.
        attempt: Which try it is at.
        begun: When that was handed out.
        futures: Those of its tries that have not ended.
        token: What ``look`` showed last.
        seen: When that was another.
        has_begun: Whether it was, ever: somebody is at it.
    """

    call: Call
    attempt: int = 1
    begun: float = 0.0
    futures: set[Future[Any]] = field(default_factory=set)
    token: Any = None
    seen: float = 0.0
    has_begun: bool = False


@dataclass
class _Course:
    """Calls on their way."""

    engine: Engine
    take: Take
    look: Look | None
    patience: float
    out: dict[Hashable, _Out] = field(default_factory=dict)
    futures: dict[Future[Any], _Out] = field(default_factory=dict)
    again: deque[_Out] = field(default_factory=deque)
    alone: deque[_Out] = field(default_factory=deque)
    ended: SimpleQueue[Future[Any]] = field(default_factory=SimpleQueue)
    last_sign: float = 0.0
    next_look: float = 0.0
    next_check: float = 0.0
    is_refused: bool = False

    def run(self, calls: Iterator[Call]) -> None:
        """Carry out all of them."""
        while True:
            self._hand_out(calls)
            if not self.out:
                return
            try:
                self._note_end(self.ended.get(timeout=self._patience_now()))
                self.next_check = monotonic() + CHECKING
            except Empty:
                pass
            if self.look is not None and monotonic() >= self.next_look:
                self._look_around()
            if self.engine.has_lost is not None and monotonic() >= self.next_check:
                self.engine.check()
                self.next_check = monotonic() + CHECKING

    def _patience_now(self) -> float | None:
        """Return how many seconds there are until there is something to look at."""
        times = [self.next_look] if self.look is not None else []
        times += [self.next_check] if self.engine.has_lost is not None else []
        return max(0.0, min(times) - monotonic()) if times else None

    def drain(self) -> None:
        """Hand over what has ended well by now, unless nobody takes it."""
        for future, each in tuple(self.futures.items()):
            if self.is_refused or not future.done() or future.cancelled():
                continue
            if future.exception() is None and each.call.key in self.out:
                self._settle(each, future.result())

    def _hand_out(self, calls: Iterator[Call]) -> None:
        """Give the engine as many calls as it takes."""
        while len(self.out) < self.engine.most:
            if self.again:
                each = self.again.popleft()
            elif (call := next(calls, None)) is not None:
                each = _Out(call)
            elif self.alone and not self.out:
                each = self.alone.popleft()
            else:
                return
            self._send(each)

    def _send(self, each: _Out) -> None:
        """Hand out a call, unless it turns out to have been carried out."""
        each.begun = each.seen = self.last_sign = monotonic()
        key = each.call.key
        self.out[key] = each
        if self.look is not None:
            each.token = self.look(key)
            each.has_begun = False
            if isinstance(each.token, Found):
                self._settle(each, each.token.result)
                return
        try:
            call = each.call
            future = self.engine.submit(_carry_out, each.attempt, call.function, *call.args)
        except EngineError:
            raise
        except Exception as error:  # it cannot be sent
            future = Future()
            future.set_exception(error)
        each.futures.add(future)
        self.futures[future] = each
        future.add_done_callback(self.ended.put)

    def _note_end(self, future: Future[Any]) -> None:
        """Take what a future says, unless it is known by now."""
        each = self.futures.get(future)
        if each is None:
            return
        error = CancelledError() if future.cancelled() else future.exception()
        if error is None:
            self._settle(each, future.result())
        elif isinstance(error, LoratoolError):
            self._settle(each, error)
        elif isinstance(error, KeyboardInterrupt):
            raise error
        else:
            del self.futures[future]
            each.futures.discard(future)
            self._note_loss(each, error)

    def _note_loss(self, each: _Out, error: BaseException) -> None:
        """Try a call again that failed for no reason of its own, or say that it did."""
        is_broken = isinstance(error, BrokenExecutor)
        key = each.call.key
        if self.look is not None and isinstance(seen := self.look(key), Found):
            self._settle(each, seen.result)
        elif each.futures:
            pass  # another try is out
        elif each.attempt > RETRIES:
            self._settle(each, error, is_lost=True)
        else:
            each.attempt += 1
            del self.out[key]
            (self.alone if is_broken and each.attempt >= RETRIES else self.again).append(each)

    def _settle(self, each: _Out, what: Any, *, is_lost: bool = False) -> None:
        """Hand over what came of a call."""
        self.last_sign = monotonic()
        if not is_lost:
            self.engine.breaks = 0
        try:
            self.take(each.call.key, what, each.attempt, self.last_sign - each.begun)
        except Exception:
            self.is_refused = True
            raise
        del self.out[each.call.key]
        for future in each.futures:
            del self.futures[future]
            future.cancel()
        each.futures.clear()

    def _look_around(self) -> None:
        """Look for signs of life, and hand out again what shows none."""
        assert self.look is not None
        begun = monotonic()
        for each in tuple(self.out.values()):
            seen = self.look(each.call.key)
            if isinstance(seen, Found):
                self._settle(each, seen.result)
            elif seen != each.token:
                each.token, each.has_begun = seen, True
                each.seen = self.last_sign = monotonic()
        now = monotonic()
        for each in tuple(self.out.values()):
            since = each.seen if each.has_begun else max(each.seen, self.last_sign)
            if now - since > self.patience:
                self._give_again(each)
        self.next_look = now + max(PERIOD, SHARE * (now - begun))

    def _give_again(self, each: _Out) -> None:
        """Hand out a call once more that nobody seems to be at; the first to end counts."""
        if each.attempt > RETRIES:
            what = f"no sign of life for {self.patience:g} s"
            self._settle(each, TimeoutError(what), is_lost=True)
            return
        each.attempt += 1
        self._send(each)


def _carry_out(attempt: int, function: Callable[..., Any], *args: Any) -> Any:
    """Carry out a call, wherever this is.

    Args:
        attempt: Which try it is. Some engines remember what came of the same call before, which
            another number makes another one.
        function: What is called.
        args: With what.
    """
    return function(*args)
