"""What calls are handed to: an executor, and another where that one has broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Final, TypeAlias

from loratool.engines.names import DASK, MPI, OPTION, PROCESSES, parse_name
from loratool.errors import EngineError, LoratoolError, OptionError

__all__ = ["Engine", "What", "opened"]

What: TypeAlias = str | Executor | Callable[[], Executor]
"""A name, an executor, or what makes one."""
MODULES: Final = {PROCESSES: "workers", DASK: "dask", MPI: "mpi"}
"""In which module of this room each kind is, imported when somebody asks for it."""
AT_ONCE: Final = 64
"""Calls that an executor is given at a time that does not say how many workers it has."""
MOST_BREAKS: Final = 20
"""Executors that may break one after the other before a call ends well."""
BROKEN: Final = (BrokenExecutor, RuntimeError, OSError)
"""What executors raise that take no calls any more."""


def _shut_down(executor: Executor, is_over: bool) -> None:
    """End an executor that was made for us."""
    try:
        executor.shutdown(not is_over, cancel_futures=is_over)
    except TypeError:  # not all of them know the newer argument
        executor.shutdown(not is_over)


@dataclass
class Engine:
    """An executor that is given a few calls at a time.

    Attributes:
        name: What it is called.
        executor: Who carries calls out; ``None`` before the first.
        make: Makes a new one; ``None`` where one was handed over, which nobody else closes.
        end: Ends one that was made, at once where the second argument says so.
        most: How many calls it is given at a time.
        has_lost: Asked now and then while calls are out and none ends: whether it has forgotten all
            of them. It raises where there is nobody to carry them out.
        broken: What is raised where it takes no calls any more.
        breaks: How many executors have broken since a call ended well.
    """

    name: str
    executor: Executor | None = None
    make: Callable[[], Executor] | None = None
    end: Callable[[Executor, bool], None] = _shut_down
    most: int = AT_ONCE
    has_lost: Callable[[], bool] | None = None
    broken: tuple[type[BaseException], ...] = BROKEN
    breaks: int = 0
    _out: set[Future[Any]] = field(default_factory=set)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Have a call carried out.

        Raises:
            EngineError: No executor takes it.
            Exception: What is wrong with the call itself, such as that it cannot be sent.
        """
        try:
            future = self._ready().submit(function, *args)
        except self.broken as error:
            if self.make is None:
                raise self._failure(error, "executor=lambda: ProcessPoolExecutor(4)") from error
            self.breaks += 1
            if self.breaks > MOST_BREAKS:
                raise self._failure(error) from error
            self._drop()
            try:
                future = self._ready().submit(function, *args)
            except self.broken as again:
                raise self._failure(again) from again
        self._out.add(future)
        future.add_done_callback(self._out.discard)
        return future

    def check(self) -> None:
        """Give up calls that nobody will answer: their futures are cancelled.

        Raises:
            EngineError: There is nobody to carry them out.
        """
        if self.has_lost is not None and self.has_lost():
            self._cancel()

    def _cancel(self) -> None:
        for future in tuple(self._out):
            future.cancel()

    def _ready(self) -> Executor:
        """Return the executor, or a new one."""
        if self.executor is None:
            assert self.make is not None
            self.executor = self.make()
        return self.executor

    def _failure(self, error: BaseException, maker: str | None = None) -> LoratoolError:
        if isinstance(error, LoratoolError):
            return error
        hint = f"give what makes a new one instead: {maker}" if maker else None
        what = f"takes no calls any more: {type(error).__name__}: {error}".rstrip(": ")
        return EngineError(self.name, what.partition("\n")[0], hint=hint)

    def _drop(self) -> None:
        """Forget an executor that has broken; whatever it still says is of no interest."""
        executor, self.executor = self.executor, None
        if executor is not None:
            with suppress(Exception):
                self.end(executor, True)

    def close(self) -> None:
        """End what was made here; it waits for calls that are out, of which there may be none."""
        self._finish(is_over=bool(self._out))

    def terminate(self) -> None:
        """Give up all calls, as far as they can be, and end what was made here."""
        self._finish(is_over=True)

    def _finish(self, *, is_over: bool) -> None:
        self._cancel()
        if self.make is not None and self.executor is not None:
            executor, self.executor = self.executor, None
            self.end(executor, is_over)


@contextmanager
def opened(what: What | None = None) -> Iterator[Engine]:
    """Give what calls are handed to, and close it behind them; at once where they fail.

    Args:
        what: ``processes``, ``processes:N``, ``dask://HOST:PORT``, ``tls://HOST:PORT`` or ``mpi``;
            an executor, which stays open; or what makes one, and is asked for another where that
            one breaks. By default processes, one for each processor.

    Raises:
        OptionError: There is no such engine, or what it needs is not installed.
        EngineError: It cannot be reached.
    """
    engine = _engine(what)
    try:
        yield engine
    except BaseException:
        engine.terminate()
        raise
    engine.close()


def _engine(what: What | None) -> Engine:
    """Return an engine by what was given for it."""
    if what is None or isinstance(what, str):
        name = parse_name(PROCESSES if what is None else what)
        module = import_module(f"loratool.engines.{MODULES[name.kind]}")
        engine: Engine = module.engine(name)
        return engine
    if isinstance(what, Executor):
        return Engine(type(what).__name__, what, most=_most(what))
    if not callable(what):
        expected = "expected a name, an Executor, or a function that makes one"
        raise OptionError(OPTION, f"is a {type(what).__name__}, {expected}")
    first = what()
    if not isinstance(first, Executor):
        made = f"makes a {type(first).__name__}, expected an Executor"
        raise OptionError(OPTION, made)
    return Engine(type(first).__name__, first, what, most=_most(first))


def _most(executor: Executor) -> int:
    """Return how many calls keep the workers of an executor busy, as far as it says.

    Where a pool breaks as a whole it takes all calls with it that it has, so it gets no more.
    """
    count = getattr(executor, "_max_workers", None)  # which pools of others have, too
    return count + 1 if isinstance(count, int) else AT_ONCE
