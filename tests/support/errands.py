"""Calls for engines: some end their process, fail or wait, as often as files of theirs say."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from loratool.errors import OptionError


def square(number: int) -> int:
    return number * number


def count_at(place: str) -> int:
    """Note a try, and return how many there were before."""
    count = len(list(Path(place).parent.glob(f"{Path(place).name}.*")))
    Path(f"{place}.{os.getpid()}-{time.monotonic_ns()}").touch()
    return count


def tries_of(place: Path) -> int:
    return len(list(place.parent.glob(f"{place.name}.*")))


def die(place: str, most: int, number: int = 0) -> int:
    """End the process of the first tries."""
    if count_at(place) < most:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(number)


def fail(place: str, most: int, error: Any = MemoryError, number: int = 0) -> int:
    """Raise an error at the first tries."""
    if count_at(place) < most:
        raise error
    return square(number)


def refuse(place: str) -> None:
    """Fail for a reason."""
    count_at(place)
    raise OptionError("a", "b", hint="c")


def die_when(place: str, path: str) -> int:
    """Say who this is, and end the process as soon as a file is there; it goes well without one."""
    first = count_at(place) == 0
    while first and not Path(path).exists():
        time.sleep(0.01)
    if first:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def wait_for(path: str, number: int = 0) -> int:
    """Return when a file is there."""
    while not Path(path).exists():
        time.sleep(0.01)
    return square(number)
