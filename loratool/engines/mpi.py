"""The processes of an MPI job: ``mpiexec -n N loratool … --executor mpi``.

All of them begin with the same command line. The first carries on with it, the others carry out
what it hands to them until it ends, and do nothing else.
"""

from __future__ import annotations

import signal
import sys
from typing import Any, Final

from loratool.engines.engine import AT_ONCE, Engine
from loratool.engines.names import OPTION, EngineName
from loratool.errors import OptionError

__all__ = ["engine", "join", "leave"]

EXTRA: Final = "pip install 'loratool[mpi]'"
SIGNALLED: Final = 128
"""Exit statuses from here on tell of signals."""
START: Final = "mpiexec -n 4 loratool … --executor mpi"

_pools: list[Any] = []
"""What the first process hands calls to: there is one in its life."""
_serving: list[bool] = []
"""Whether this is one of the others."""


def engine(name: EngineName) -> Engine:
    """Return the other processes of the job that this one is the first of.

    Raises:
        OptionError: mpi4py is not installed, or there are no other processes.
    """
    join()
    if not _pools:
        what = "there is one process, which is not enough"
        if _serving:
            what = "this process serves another one already"
        raise OptionError(f"{OPTION} mpi", what, hint=START)
    executor = _pools[-1]
    return Engine(name.kind, executor, most=max(AT_ONCE, 2 * executor.num_workers))


def join() -> None:
    """Take part in the job, where there is one: the first process goes on, the others serve.

    Raises:
        OptionError: mpi4py is not installed, or finds no MPI.
        SystemExit: In the others, when the first has ended.
    """
    if _pools or _serving:
        return
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except ModuleNotFoundError:
        raise OptionError(f"{OPTION} mpi", "needs the package mpi4py", hint=EXTRA) from None
    except (ImportError, RuntimeError) as error:
        what = f"finds no MPI on this machine: {str(error).partition(chr(10))[0]}"
        hint = "pip install mpich, or load that of the cluster"
        raise OptionError(f"{OPTION} mpi", what, hint=hint) from None
    world = MPI.COMM_WORLD
    if world.Get_size() == 1:
        return
    pool = MPICommExecutor(world, main=False)
    if world.Get_rank() == 0:
        _pools.append(pool.__enter__())
        return
    _serving.append(True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pool:
        pass  # until the first has ended
    raise SystemExit(0)


def leave(status: int) -> None:
    """Let the other processes go, before this one ends.

    Args:
        status: The exit status. Where a signal is behind it, what the others are at is not waited
            for: the whole job ends.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None:
        return
    if _pools and status >= SIGNALLED:
        sys.stdout.flush()
        sys.stderr.flush()
        mpi.COMM_WORLD.Abort(status)
    for executor in _pools:
        executor.shutdown(cancel_futures=True)
    _pools.clear()
    if not mpi.Is_finalized():
        mpi.Finalize()
