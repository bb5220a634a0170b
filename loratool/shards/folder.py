"""The folder beside an output in which its parts come together: ``OUT.loratool-parts``.

===========================  =========================================================
``plan.json``                what is made, and the digest that all who work on it agree on
``output/``                  what will be the output: files that are whole
``work/``                    files that are being written; those of killed workers are harmless
``records/0003.json``        part 3 is done: written after its files are in their place
``records/0003.failed.json`` why part 3 failed when it was tried last
``claims/0003``              who is at part 3, and how far; it grows as long as somebody is
===========================  =========================================================

Everything is written by renaming or by linking, so that any number of processes on any number of
machines may work in it, in any order, and be killed at any moment.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import loratool
from loratool.errors import FileFormatError, LoratoolError, OutputExistsError
from loratool.files.atomic import hidden_name, publish, sync_file
from loratool.files.json import parse_json, read_json_object
from loratool.files.transfer import describe_write_error

__all__ = ["PLAN_VERSION", "STALE", "SUFFIX", "Claim", "PartsFolder", "is_inside", "worker_name"]

SUFFIX: Final = ".loratool-parts"
PLAN_VERSION: Final = 1
"""Of the form of plans and records; another is refused."""
GONE_MARK: Final = "loratool-gone"
BEAT: Final = 2.0
"""Seconds between two signs of life."""
FINISH: Final = 0
"""In place of the number of a part, which begin at 1: of what is done at the end."""
STALE: Final = 600.0
"""Seconds without a sign of life after which what somebody does is taken over."""
ATTEMPTS: Final = 50
PAUSE: Final = 0.1
TICK: Final = re.compile(rb"\d{1,18}")
RUN: Final = os.urandom(8).hex()
"""Of this process: in containers many have the same number, one after the other."""


def is_inside(name: str) -> bool:
    """Whether a name, with ``/`` between folders, leads out of no folder that it lies in."""
    return not {"", ".", ".."} & {*name.split("/")} and "\0" not in name


def _are(parts: object) -> bool:
    """Whether these are names and sizes of parts."""
    return isinstance(parts, list) and all(
        isinstance(each, list) and [type(one) for one in each] == [str, int] and each[1] >= 0
        for each in parts
    )


def worker_name() -> str:
    """Return what this process is called among all that work on an output."""
    host = "".join(c if c.isalnum() or c in "-_" else "-" for c in socket.gethostname())
    return f"{host[:60]}.{os.getpid()}"


@dataclass
class Claim:
    """That somebody is at a part.

    Attributes:
        path: The file that says so.
        host: On which machine.
        pid: As which process.
        done: How many bytes are done.
        size: Of the file: it grows as long as somebody is at work.
        run: What tells the process from an earlier one of the same number.
    """

    path: Path
    host: str
    pid: int
    done: int = 0
    size: int = 0
    run: str = ""
    _told: float = 0.0

    def beat(self, done: int, total: int = 0) -> None:
        """Give a sign of life, now and then."""
        now = time.monotonic()
        if now - self._told < BEAT:
            return
        self._told = now
        with suppress(OSError):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                os.write(descriptor, f"{done}\n".encode())
            finally:
                os.close(descriptor)

    @property
    def is_dead(self) -> bool:
        """Whether a process of this machine was at it, and is not any more."""
        if self.host != socket.gethostname():
            return False
        if self.pid == os.getpid():  # containers give all processes one number
            return self.run != RUN
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
        return False

    @staticmethod
    def read(path: Path) -> Claim | None:
        """Return a claim; ``None`` where there is none, nobody's where it does not say whose."""
        try:
            data = path.read_bytes()
        except OSError:
            return None
        head, _, rest = data.partition(b"\n")
        ticks = [int(line) for line in rest.split(b"\n")[:-1] if TICK.fullmatch(line)]
        try:
            said = parse_json(head, where=path)
            host, pid, run = str(said["host"]), int(said["pid"]), str(said.get("run"))
        except (FileFormatError, TypeError, KeyError, ValueError, OverflowError):
            host, pid, run = "", 0, ""
        return Claim(path, host, pid, ticks[-1] if ticks else 0, len(data), run)


class PartsFolder:
    """Where the parts of an output come together.

    Args:
        output: The output.
    """

    def __init__(self, output: Path) -> None:
        self.output = Path(os.path.abspath(output))  # noqa: PTH100 - links stay
        self.path = self.output.with_name(self.output.name + SUFFIX)
        self.made = self.path / "output"
        self.work = self.path / "work"
        self._records = self.path / "records"
        self._claims = self.path / "claims"

    @property
    def plan_path(self) -> Path:
        """The file that says what is made."""
        return self.path / "plan.json"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the disk refuses into an error that says so of the output."""
        try:
            yield
        except OSError as error:
            if isinstance(error, LoratoolError):
                raise
            raise describe_write_error(self.path, error) from None

    def begin(self, document: Mapping[str, Any]) -> bool:
        """Make the folder, or find it there, and make sure that all agree on what is made.

        Args:
            document: What ``plan.json`` holds, its ``"digest"`` among it.

        Returns:
            Whether it was made.

        Raises:
            OutputExistsError: It is of another plan.
            OutputError: It cannot be written.
        """
        with self.writing():
            for folder in (self.path, self.made, self.work, self._records, self._claims):
                folder.mkdir(exist_ok=True)
            is_new = self._create(self.plan_path, document)
            self.clear()
        found = document if is_new else self.plan()
        if found["digest"] != document["digest"]:
            raise self.of_another(found)
        return is_new

    def of_another(self, document: Mapping[str, Any]) -> OutputExistsError:
        """Return the error that the folder is of another command."""
        version = document.get("loratool")
        what = "holds parts of an output of other inputs or options"
        if version != loratool.__version__:
            what = f"holds parts that version {version!r:.30} of loratool has made"
        hint = f"give the same command, or delete that folder: rm -r {shlex.quote(str(self.path))}"
        return OutputExistsError(self.path, what, hint=hint)

    def plan(self) -> dict[str, Any]:
        """Return what ``plan.json`` holds.

        Raises:
            FileFormatError: It is damaged, or of another version.
            MissingFileError: There is none.
        """
        found = read_json_object(self.plan_path, allow_halves=True)
        if found.get("plan") != PLAN_VERSION:
            raise FileFormatError(
                self.plan_path,
                f"is a plan of version {found.get('plan')!r:.20}, expected {PLAN_VERSION}",
                hint="finish with the version of loratool that began",
            )
        if not all(isinstance(found.get(name), str) for name in ("digest", "verb")) or not _are(
            found.get("parts")
        ):
            raise FileFormatError(self.plan_path, "is damaged", hint=f"delete {self.path}")
        return found

    def _create(self, path: Path, document: Mapping[str, Any]) -> bool:
        """Write a file where there is none; return whether it was written."""
        if path.exists():
            return False
        partial = self._fresh(path.name)
        # A line for each key: json's own indentation takes seven times as long.
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in document.items())
        partial.write_text(f"{{\n{lines}\n}}\n")
        sync_file(partial)
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return self._create_openly(path, partial)
        finally:
            partial.unlink(missing_ok=True)
        return True

    def _create_openly(self, path: Path, partial: Path) -> bool:
        mark = self.work / f"{path.name}.begun"
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            for _ in range(ATTEMPTS):
                if path.exists():
                    return False
                time.sleep(PAUSE)
            mark.unlink(missing_ok=True)
            return self._create_openly(path, partial)
        partial.replace(path)
        return True

    def _replace(self, path: Path, document: Mapping[str, Any]) -> None:
        partial = self._fresh(path.name)
        partial.write_text(json.dumps(document) + "\n")
        sync_file(partial)
        partial.replace(path)

    def _fresh(self, name: str) -> Path:
        """Return a path that nobody else writes to: no other thread, either."""
        return self.work / f"{name}.{worker_name()}.{os.urandom(3).hex()}"

    # -- records --------------------------------------------------------------------------------

    def record(self, number: int, digest: str) -> dict[str, Any] | None:
        """Return the record of a part that is done, and whose files are there."""
        try:
            found = read_json_object(self._records / f"{number:04}.json", allow_halves=True)
            is_whole = found.get("plan") == digest and all(
                self._sized(str(name), size) for name, size in found["files"].items()
            )
        except (FileFormatError, AttributeError, KeyError, ValueError):
            return None
        return found if is_whole else None

    def _sized(self, name: str, size: object) -> bool:
        """Whether a file of a record is there, as long as it says; one that is shared, too."""
        if not is_inside(name):
            return False
        for folder in (self.made, self.work):
            try:
                if (folder / name).stat().st_size == size:
                    return True
            except OSError:
                continue
        return False

    def write_record(self, number: int, record: Mapping[str, Any]) -> None:
        """Say that a part is done."""
        self._replace(self._records / f"{number:04}.json", record)
        self._failure(number).unlink(missing_ok=True)

    def _failure(self, number: int) -> Path:
        return self._records / f"{number:04}.failed.json"

    def write_failure(self, number: int, failure: Mapping[str, Any]) -> None:
        """Say why a part failed, where the disk lets us."""
        with suppress(OSError):
            self._replace(self._failure(number), failure)

    def failure(self, number: int) -> dict[str, Any] | None:
        """Return why a part failed when it was tried last."""
        try:
            found = read_json_object(self._failure(number), allow_halves=True)
        except FileFormatError:
            return None
        return found if isinstance(found.get("error"), dict) else None

    # -- claims ---------------------------------------------------------------------------------

    def claim(self, number: int) -> Claim | None:
        """Claim a part; ``None`` where somebody else has."""
        path = self._claims / f"{number:04}"
        host, pid = socket.gethostname(), os.getpid()
        head = json.dumps({"host": host, "pid": pid, "run": RUN}).encode() + b"\n"
        with self.writing():
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
            except FileExistsError:
                return None
            except FileNotFoundError:
                if self.plan_path.exists():
                    raise
                return None  # somebody has finished
            try:
                os.write(descriptor, head)
            finally:
                os.close(descriptor)
        return Claim(path, host, pid, run=RUN)

    def claimed(self, number: int) -> Claim | None:
        """Return who is at a part, as far as they say."""
        return Claim.read(self._claims / f"{number:04}")

    def take_over(self, number: int) -> None:
        """Take away the claim of somebody who gives no sign of life; of several one succeeds."""
        with suppress(FileNotFoundError):
            (self._claims / f"{number:04}").rename(self.work / f"claim-{number}.{worker_name()}")

    def release(self, claim: Claim) -> None:
        """Give a claim back."""
        claim.path.unlink(missing_ok=True)

    # -- the end --------------------------------------------------------------------------------

    @contextmanager
    def bench(self) -> Iterator[Path]:
        """Give a folder of this process's own to write in; there is none once somebody finished.

        Raises:
            FileNotFoundError: Somebody has.
        """
        place = self._fresh("bench")
        place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def keep(self, path: Path, name: str) -> None:
        """Let a file that is whole be one of what was made.

        Args:
            path: Where it was written.
            name: Its name, with the folders that it lies in.
        """
        for parent in [*Path(name).parents][-2::-1]:
            (self.made / parent).mkdir(exist_ok=True)  # not what they lie in, which may be gone
        path.replace(self.made / name)

    def add(self, write: Callable[[Path], None], name: str) -> None:
        """Add a small file to what was made, whole or not at all.

        Args:
            write: Writes it into a folder, under its name.
            name: Its name.
        """
        with self.bench() as place:
            write(place)
            sync_file(place / name)
            self.keep(place / name, name)

    @contextmanager
    def finishing(self) -> Iterator[Claim | None]:
        """Let one process at a time make the output of the parts.

        Yields:
            ``None`` where another has finished, and there are no parts any more.
        """
        seen, since = -1, time.monotonic()
        claim = None
        while self.plan_path.exists() and (claim := self.claim(FINISH)) is None:
            other = self.claimed(FINISH)
            if other is not None and other.size != seen:
                seen, since = other.size, time.monotonic()
            if other is not None and (other.is_dead or time.monotonic() - since > STALE):
                self.take_over(FINISH)
            else:
                time.sleep(PAUSE)
        try:
            yield claim
        finally:
            if claim is not None:
                self.release(claim)

    def publish(self, *, folder: bool, force: bool) -> None:
        """Let what was made be the output.

        Raises:
            OutputError: It cannot be renamed, or something is there.
        """
        self._finishing.touch()
        source = self.made if folder else self.made / self.output.name
        with self.writing():
            publish(source, self.output, force=force)

    @property
    def _finishing(self) -> Path:
        """A file that says that all parts were there, and only the renaming is left."""
        return self._records / "finishing"

    def is_published(self, *, folder: bool) -> bool:
        """Whether what was made is the output by now, and only this folder is left."""
        source = self.made if folder else self.made / self.output.name
        return self._finishing.exists() and not source.exists() and self.output.exists()

    def remove(self) -> None:
        """Remove the folder, at once for all who look."""
        aside = f"{hidden_name(self.path, GONE_MARK)}-{os.urandom(4).hex()}"
        with suppress(OSError):
            self.path.rename(self.path.with_name(aside))
        self.clear()

    def clear(self) -> None:
        """Remove what is left of it where somebody was killed who removed it."""
        mark = glob.escape(hidden_name(self.path, GONE_MARK))
        for aside in self.path.parent.glob(f"{mark}-*"):
            shutil.rmtree(aside, ignore_errors=True)
