"""A cluster of dask here, whose scheduler and workers are processes that may be killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]


class DaskCluster:
    """A scheduler and workers of one thread each.

    Args:
        folder: Where the workers begin.
        workers: How many.
    """

    def __init__(self, folder: Path, workers: int = 2) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.folder = folder
        self.count = workers
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []

    @property
    def name(self) -> str:
        return f"dask://127.0.0.1:{self.port}"

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        self.scheduler = self._run("dask_scheduler", *address)
        while not self._is_listening():
            assert self.scheduler.poll() is None
            time.sleep(0.02)
        for _ in range(self.count):
            self.add_worker(environment)

    def _is_listening(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def add_worker(self, environment: Mapping[str, str] | None = None) -> None:
        """Start a worker without a nanny: nobody starts another in its place."""
        options = ("--nthreads", "1", "--no-nanny", "--local-directory", str(self.folder))
        address = f"tcp://127.0.0.1:{self.port}"
        self.workers.append(self._run("dask_worker", address, *options, environment=environment))

    def kill_scheduler(self) -> None:
        assert self.scheduler is not None
        self.scheduler.kill()
        self.scheduler.wait()

    def _run(
        self, command: str, *options: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        path = os.pathsep.join((str(ROOT), str(SUPPORT)))
        words = [sys.executable, "-m", f"distributed.cli.{command}", *options, "--no-dashboard"]
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.workers, self.scheduler):
            if process is not None:
                process.kill()
                process.wait()
