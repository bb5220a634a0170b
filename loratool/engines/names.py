"""What engines are called, and what is wrong with a name that is none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from loratool.errors import OptionError, printable

__all__ = ["DASK", "MOST", "MPI", "NAMES", "OPTION", "PROCESSES", "EngineName", "parse_name"]

PROCESSES: Final = "processes"
DASK: Final = "dask"
MPI: Final = "mpi"
OPTION: Final = "--executor"
NAMES: Final = (PROCESSES, "processes:N", "dask://HOST:PORT", "tls://HOST:PORT", MPI)
MOST: Final = 1024
"""Processes on this machine."""
PORT: Final = 8786
"""Where a scheduler of dask listens if it is not told otherwise."""
HOST: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:(?P<port>\d{1,5}))?/?", re.ASCII)
PROTOCOLS: Final = {"dask": "tcp", "tls": "tls"}
"""What the scheduler of dask is spoken to with, by how an address begins."""


@dataclass(frozen=True, slots=True)
class EngineName:
    """A name that is understood.

    Attributes:
        kind: ``processes``, ``dask`` or ``mpi``.
        count: How many processes; ``None`` for one for each processor.
        address: That of a scheduler, as dask writes it.
    """

    kind: str
    count: int | None = None
    address: str = ""


def parse_name(given: str) -> EngineName:
    """Return what a name means.

    Raises:
        OptionError: It is none, or is not complete.
    """
    kind, separator, rest = given.partition("://")
    if separator:
        return _address(kind, rest)
    kind, separator, rest = given.partition(":")
    if kind == PROCESSES:
        if not separator:
            return EngineName(PROCESSES)
        if re.fullmatch(r"\d{1,4}", rest, re.ASCII) and 1 <= int(rest) <= MOST:
            return EngineName(PROCESSES, int(rest))
        what = f"'{printable(given)}' says no number of processes from 1 to {MOST}"
        raise OptionError(OPTION, what, hint=f"{OPTION} processes:4")
    if given == MPI:
        return EngineName(MPI)
    if kind in PROTOCOLS:
        raise _no_address(kind)
    raise OptionError.none_of(OPTION, printable(given), NAMES)


def _address(kind: str, rest: str) -> EngineName:
    """Return a cluster by its address, which no message repeats: it may hold a password.

    Raises:
        OptionError: There is none of the kind, or it cannot be one.
    """
    found = HOST.fullmatch(rest)
    if kind == "tcp":  # as the scheduler itself prints it
        hint = f"{OPTION} dask://{rest}" if found is not None else f"{OPTION} dask://HOST:{PORT}"
        raise OptionError(OPTION, "'tcp://…' is called dask://… here", hint=hint)
    if kind not in PROTOCOLS:
        raise OptionError.none_of(OPTION, f"{printable(kind)}://…", NAMES)
    if "@" in rest:
        what = f"'{kind}://…' holds a user's name, and dask knows none"
        raise OptionError(OPTION, what, hint=f"{OPTION} {kind}://HOST:{PORT}")
    if found is None or int(found["port"] or PORT) > 65535:
        raise _no_address(kind)
    return EngineName(DASK, None, f"{PROTOCOLS[kind]}://{found['host']}:{found['port'] or PORT}")


def _no_address(kind: str) -> OptionError:
    what = f"{kind} lacks the address of a scheduler, or it is none"
    return OptionError(OPTION, what, hint=f"{OPTION} {kind}://HOST:{PORT}")
