"""A cluster of dask that is there: ``dask://HOST:PORT``, the address of its scheduler."""

from __future__ import annotations

import logging
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any, Final

import loratool
from loratool.engines.engine import BROKEN, Engine
from loratool.engines.names import OPTION, EngineName
from loratool.errors import EngineError, OptionError, printable

__all__ = ["engine"]

EXTRA: Final = "pip install 'loratool[dask]'"
CONNECTING: Final = 10
"""Seconds to wait for the scheduler."""
JOINING: Final = 120
"""Seconds to wait for the first worker, which some clusters start when there is something to do."""
AT_ONCE: Final = 1000
"""Calls that the scheduler is given at a time: it hands them out as workers come and go."""


def engine(name: EngineName) -> Engine:
    """Return a connection to a scheduler.

    Raises:
        OptionError: dask is not installed.
        EngineError: There is no scheduler, no worker, or the workers have another loratool.
    """
    try:
        import distributed
    except ModuleNotFoundError as error:
        raise OptionError(OPTION, f"needs the package {error.name}", hint=EXTRA) from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # which we tell ourselves

    def make() -> Executor:
        return _connected(distributed, name.address)

    broken = (*BROKEN, distributed.client.ClosedClientError)
    first = make()
    threads = sum(first._client.nthreads().values())  # type: ignore[attr-defined]
    return Engine(_shown(name.address), first, make, _end, max(AT_ONCE, 2 * threads), broken)


def _shown(address: str) -> str:
    """Return an address as it is given to us."""
    protocol, _, rest = address.partition("://")
    return f"{'dask' if protocol == 'tcp' else protocol}://{rest}"


def _connected(distributed: Any, address: str) -> Executor:
    """Return an executor of the cluster at an address."""
    shown = _shown(address)
    try:
        client = distributed.Client(address, timeout=CONNECTING, set_as_default=False)
    except (OSError, ValueError, RuntimeError) as error:
        what = f"cannot be reached: {_first_line(error)}"
        hint = f"start one there: dask scheduler --port {address.rpartition(':')[2]}"
        raise EngineError(shown, what, hint=hint) from error
    try:
        _check_workers(client, shown, address)
        executor: Executor = client.get_executor(pure=False)
    except BaseException:
        client.close()
        raise
    return executor


def _check_workers(client: Any, shown: str, address: str) -> None:
    """Make sure that there are workers, and that they have this version.

    Raises:
        EngineError: There are none, or it is another.
    """
    where = f"{OPTION} {shown}"
    hint = f"install loratool {loratool.__version__} where its workers are"
    try:
        client.submit(_version, pure=False).result(timeout=JOINING)
        found = client.run(_version, on_error="return")
    except TimeoutError:
        what = f"has no worker that is free in {JOINING} s"
        start = f"start some: dask worker {address}"
        raise EngineError(shown, what, hint=start) from None
    except Exception as error:
        what = f"its workers cannot run loratool: {_first_line(error)}"
        raise EngineError(shown, what, hint=hint) from error
    for worker, version in found.items():
        if version != loratool.__version__:
            is_error = isinstance(version, Exception)
            told = _first_line(version) if is_error else f"has loratool {printable(version)}"
            raise EngineError(where, f"its worker {printable(worker)} {told}", hint=hint)


def _version() -> str:
    """Return the version of loratool here."""
    return loratool.__version__


def _first_line(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(": "))


def _end(executor: Executor, is_over: bool) -> None:
    client = executor._client  # type: ignore[attr-defined]
    with suppress(Exception):  # a scheduler that is gone has nothing to close
        executor.shutdown(not is_over)
    client.close()
