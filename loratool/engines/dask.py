"""A cluster of dask that is there: ``dask://HOST:PORT``, the address of its scheduler."""

from __future__ import annotations

import logging
from concurrent.futures import Executor
from contextlib import suppress
from pkgutil import resolve_name
from time import monotonic
from typing import Any, Final

import loratool
from loratool.engines.engine import BROKEN, Engine
from loratool.engines.names import OPTION, EngineName
from loratool.errors import EngineError, OptionError, printable

__all__ = ["engine"]

EXTRA: Final = "pip install 'loratool[dask]'"
VERSION: Final = "loratool:__version__"
CONNECTING: Final = 10
"""Seconds to wait for the scheduler."""
JOINING: Final = 120
"""Seconds to wait for a worker, which some clusters start when there is something to do."""
AT_ONCE: Final = 1000
"""Calls that the scheduler is given at a time: it hands them out as workers come and go."""


def engine(name: EngineName) -> Engine:
    """Return a connection to a scheduler.

    Raises:
        OptionError: dask is not installed.
        EngineError: It cannot be had; see :meth:`_Cluster.connect`.
    """
    try:
        import distributed
    except ModuleNotFoundError as error:
        raise OptionError(OPTION, f"needs the package {error.name}", hint=EXTRA) from None
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # we say it ourselves

    cluster = _Cluster(distributed, name.address)
    broken = (*BROKEN, distributed.client.ClosedClientError)
    first = cluster.connect()
    most = max(AT_ONCE, 2 * cluster.threads())
    return Engine(cluster.shown, first, cluster.connect, _end, most, cluster.has_lost, broken)


class _Cluster:
    """A scheduler at an address, and its workers.

    Args:
        distributed: The library.
        address: As the library writes it.
    """

    def __init__(self, distributed: Any, address: str) -> None:
        self.distributed = distributed
        self.address = address
        protocol, _, rest = address.partition("://")
        self.shown = f"{'dask' if protocol == 'tcp' else protocol}://{rest}"
        self.client: Any = None
        self.connection: Any = None
        self.last_seen = 0.0

    def connect(self) -> Executor:
        """Return an executor.

        Raises:
            EngineError: There is no scheduler, no worker, or the workers have another loratool.
        """
        try:
            client = self.distributed.Client(self.address, timeout=CONNECTING, set_as_default=False)
        except (OSError, ValueError, RuntimeError) as error:
            what = f"cannot be reached: {_first_line(error)}"
            hint = f"start one there: dask scheduler --port {self.address.rpartition(':')[2]}"
            raise EngineError(self.shown, what, hint=hint) from error
        self.client = client
        try:
            self._check_versions()
        except BaseException:
            client.close()
            raise
        self.connection, self.last_seen = client.scheduler_comm, monotonic()
        executor: Executor = client.get_executor(pure=False)
        return executor

    def threads(self) -> int:
        """Return how many calls its workers carry out at a time."""
        return sum(self.client.nthreads().values())

    def has_lost(self) -> bool:
        """Whether the connection is another one by now, or none: futures of before may never end.

        Raises:
            EngineError: There has been no worker for a while.
        """
        if self.client.status == "closed":
            return True
        connection = self.client.scheduler_comm
        if connection is None:  # it tries to have one again
            return False
        if connection is not self.connection:
            self.connection, self.last_seen = connection, monotonic()
            return True
        with suppress(OSError):
            if self.threads():
                self.last_seen = monotonic()
        if monotonic() - self.last_seen > JOINING:
            raise self._without_workers()
        return False

    def _without_workers(self) -> EngineError:
        hint = f"start some: dask worker {self.address}"
        return EngineError(self.shown, f"has had no free worker for {JOINING} s", hint=hint)

    def _check_versions(self) -> None:
        """Make sure that there are workers, and that they have this version.

        Raises:
            EngineError: There are none, or it is another.
        """
        hint = f"install loratool {loratool.__version__} where its workers are"
        try:
            # By what every Python has: a function of ours that it cannot import ends a worker.
            self.client.submit(resolve_name, VERSION, pure=False).result(timeout=JOINING)
            found = self.client.run(resolve_name, VERSION, on_error="return")
        except TimeoutError:
            raise self._without_workers() from None
        except Exception as error:
            what = f"its workers cannot run loratool: {_first_line(error)}"
            raise EngineError(self.shown, what, hint=hint) from error
        for worker, version in found.items():
            if version != loratool.__version__:
                is_error = isinstance(version, Exception)
                told = _first_line(version) if is_error else f"has loratool {printable(version)}"
                what = f"its worker {printable(worker)} {told}"
                raise EngineError(self.shown, what, hint=hint)


def _first_line(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(": "))


def _end(executor: Executor, is_over: bool) -> None:
    client = executor._client  # type: ignore[attr-defined]
    with suppress(Exception):  # a scheduler that is gone has nothing to close
        executor.shutdown(not is_over)
    client.close()
