"""Outputs that appear whole or not at all.

Everything is written under a hidden name beside its destination and renamed at the end. A run
that is killed leaves only that hidden name; the next run for the same destination removes it,
once it has made sure (by a lock on it) that no living process is still writing there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import shutil
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from loratool.display.figures import human_bytes
from loratool.errors import (
    FullDiskError,
    LoratoolError,
    MissingFolderError,
    OutputDeniedError,
    OutputError,
    OutputExistsError,
)
from loratool.files.belonging import check_contents
from loratool.files.containers import is_weights
from loratool.files.targets import target_of
from loratool.files.transfer import describe_write_error

__all__ = ["check_output", "hidden_name", "kept", "publish", "scratch", "staged", "sync_file"]

MARK: Final = "loratool-partial"
OLD_MARK: Final = "loratool-old"
KEPT_MARK: Final = "loratool-unfinished"
ATTEMPTS: Final = 100
FOLDER_ONLY: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK
LONGEST_NAME: Final = 200
"""Bytes of a name that hidden ones beside it begin with whole; file systems allow 255."""
OVERTAKEN: Final = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR)
"""What renaming fails with where another process has replaced or removed the destination."""


def check_output(
    path: Path,
    *,
    force: bool,
    inputs: Iterable[Path],
    needed: int = 0,
    names: Iterable[str] = (),
    kinds: Collection[str] = (),
    folder: bool = False,
) -> None:
    """Make sure that ``path`` may be written, before any work is done.

    Args:
        path: The destination, a file or a folder.
        force: Whether an existing destination may be replaced.
        inputs: Files and folders that the run reads; the destination may not touch them.
        needed: Bytes that will be written, to be compared with the free space.
        names: Files that will be in the destination, where it is a folder.
        kinds: Suffixes of files that may be replaced; by default those of weights.
        folder: Whether a folder will be written, so that no file may be there.

    Raises:
        OutputError: It exists, its folder does not, it is an input, or the disk is full.
        StoreError: It is in a store that does not tell.
    """
    if target_of(path) is not None:
        from loratool.files.objects.outputs import check_object

        check_object(path, force=force, inputs=inputs, names=names, kinds=kinds, folder=folder)
        return
    parent = path.absolute().parent
    if not parent.is_dir():
        raise MissingFolderError(
            path, "its folder does not exist", hint=f"mkdir -p {shlex.quote(str(parent))}"
        )
    _recover(path.absolute(), force=force)
    target = path.resolve()
    around = {_identity(each) for each in (target, *target.parents)} - {None}
    for source in dict.fromkeys(inputs):
        real = source.resolve()
        # The same file or folder may have several paths: bind mounts, letters of either case.
        is_met = target == real or _identity(real) in around
        is_met = is_met or _identity(target) in {_identity(each) for each in real.parents} - {None}
        if is_met or target in real.parents:
            raise OutputError(path, f"would overwrite the input {source}", hint="choose another")
    if (path.exists() or path.is_symlink()) and not force:
        raise OutputExistsError(path, "exists already", hint="choose another name, or give --force")
    _check_replaceable(path, frozenset(names), kinds, folder=folder)
    if not os.access(parent, os.W_OK):
        raise OutputDeniedError(path, "its folder is not writable")
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise FullDiskError(
            path,
            f"needs {human_bytes(needed)}, but only {human_bytes(free)} are free there",
            hint="free some space, or choose another disk",
        )


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what a file or folder is, whatever it is called; ``None`` if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _check_replaceable(
    path: Path, names: frozenset[str], kinds: Collection[str], *, folder: bool
) -> None:
    """Refuse to replace what no run of this program, nor of its like, has written.

    Raises:
        OutputError: A device, a pipe, somebody's file, or a folder with somebody's work in it.
    """
    if not path.exists() or (path.is_symlink() and not path.is_dir()):
        return
    if path.is_file():
        is_ours = path.suffix.lower() in kinds if kinds else is_weights(path)
        if folder or not is_ours:
            what = "is a file, and the output is a folder" if folder else "is another kind of file"
            raise OutputExistsError(path, f"{what}; it is not replaced", hint="choose another name")
        return
    if not path.is_dir():
        raise OutputExistsError(path, "is a device or a pipe, and is not replaced")
    if path.is_symlink():
        return
    check_contents(path, _contents(path), names)


def _contents(folder: Path) -> Iterator[str]:
    """Yield the files in a folder and below by their paths in it."""
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() or path.is_symlink():
            yield path.relative_to(folder).as_posix()


@contextmanager
def staged(path: Path, *, folder: bool, force: bool, sync: bool) -> Iterator[Path]:
    """Give a fresh place to write to; on success it becomes ``path``, otherwise it vanishes.

    Args:
        path: The destination. What exists there is replaced at the end, and only then.
        folder: Whether the destination is a folder (the place is then an empty one) or a file.
        force: Whether what has appeared at the destination meanwhile may be replaced.
        sync: Whether to wait until the renaming is on the disk. Without it a crash of the
            machine (not of the process) may still lose what the system had not written.
    """
    path = path.absolute()
    if target_of(path) is not None:
        from loratool.files.objects.outputs import stored

        with stored(path, folder=folder, force=force) as place:
            yield place
        return
    with scratch(path) as stage:
        try:
            place = stage if folder else stage / path.name
            yield place
            publish(place, path, force=force)
            if sync:
                sync_file(path.parent)
        except LoratoolError:  # of which some are OSErrors too, and say themselves what it is
            raise
        except OSError as error:
            raise describe_write_error(path, error) from None


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Give a hidden folder beside ``path``, locked while it is used and removed in the end.

    What killed runs for the same path have left is removed first.
    """
    path = path.absolute()
    _remove_stale(path)
    try:
        folder, lock = _locked_folder(path)
    except OSError as error:
        raise describe_write_error(path, error) from None
    try:
        yield folder
    finally:
        os.close(lock)
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except BaseException:  # a signal: it ends the run, and not the removing
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _locked_folder(path: Path) -> tuple[Path, int]:
    """Make a hidden folder beside ``path``, and return it with the descriptor that locks it.

    Until it is locked, a run that starts at the same time may take it for a killed one's.
    """
    for _ in range(ATTEMPTS):
        folder = path.parent / f"{hidden_name(path, MARK)}-{os.urandom(4).hex()}"
        folder.mkdir()
        try:
            lock = os.open(folder, FOLDER_ONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists():
                return folder, lock
            os.close(lock)
        except BlockingIOError:
            os.close(lock)
        except BaseException:  # a signal, too
            os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)
            raise
    raise OSError(errno.EAGAIN, "too many runs begin at once")


@contextmanager
def kept(path: Path) -> Iterator[Path]:
    """Give the hidden folder beside ``path`` that outlives an interrupted run.

    It is removed only where the block ends without an error.

    Raises:
        OutputError: Another process uses it, or it cannot be written.
    """
    if target_of(path) is not None:
        raise OutputError(
            path, "is in a store, where nothing half done is kept", hint="leave out --resume"
        )
    path = path.absolute()
    folder = path.parent / hidden_name(path, KEPT_MARK)
    try:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, FOLDER_ONLY)
    except OSError as error:
        raise describe_write_error(path, error) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(path, "another run is at work on it") from None
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def publish(source: Path, path: Path, *, force: bool) -> None:
    """Let what is whole be called ``path``.

    Raises:
        OutputExistsError: Something is there, and ``force`` does not say that it may be replaced.
        OSError: It cannot be renamed.
    """
    if not force and (path.exists() or path.is_symlink()):
        raise OutputExistsError(path, "has appeared meanwhile", hint="choose another name")
    _replace(source, path)


def _replace(source: Path, path: Path) -> None:
    """Rename ``source`` to ``path``, whatever is there; again where another run was quicker."""
    for _ in range(ATTEMPTS):
        try:
            return _replace_once(source, path)
        except OSError as error:
            if error.errno not in OVERTAKEN:
                raise
    return _replace_once(source, path)


def _replace_once(source: Path, path: Path) -> None:
    is_plain = not path.is_dir() or path.is_symlink()
    if not source.is_dir() and is_plain:
        source.replace(path)
    elif not os.path.lexists(path):
        source.rename(path)
    else:
        _exchange(source, path)


def _exchange(source: Path, path: Path) -> None:
    """Rename ``source`` to ``path`` where no system call does both: what is there goes aside."""
    aside = path.parent / f"{hidden_name(path, OLD_MARK)}-{os.urandom(4).hex()}"
    try:
        path.rename(aside)
        source.rename(path)
    except BaseException:  # a signal, too: the old output comes back
        if os.path.lexists(aside):
            try:
                aside.rename(path)
            except OSError as error:
                if error.errno in OVERTAKEN:  # another run's output is there
                    _discard(aside)
        raise
    _discard(aside)


def _discard(path: Path) -> None:
    """Remove a folder with what is in it, or a file, or a link, as far as that goes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def hidden_name(path: Path, mark: str) -> str:
    """Return what hidden names beside ``path`` begin with; shorter where its own is long."""
    name = path.name
    encoded = os.fsencode(name)
    if len(encoded) > LONGEST_NAME:
        name = f"{os.fsdecode(encoded[: LONGEST_NAME // 2])}~{zlib.crc32(encoded):08x}"
    return f".{name}.{mark}"


def sync_file(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _recover(path: Path, *, force: bool) -> None:
    """Put back an output that a killed run has moved aside and not replaced."""
    for aside in path.parent.glob(f"{_escape(hidden_name(path, OLD_MARK))}-*"):
        if not (aside.is_symlink() or aside.is_dir() or aside.is_file()):
            continue
        if os.path.lexists(path):
            if force and aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside, ignore_errors=True)
        else:
            with suppress(OSError):
                aside.rename(path)


def _remove_stale(path: Path) -> None:
    """Remove what killed runs for the same destination have left; no more than folders."""
    for stage in path.parent.glob(f"{_escape(hidden_name(path, MARK))}-*"):
        try:
            lock = os.open(stage, FOLDER_ONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(stage, ignore_errors=True)
        finally:
            os.close(lock)


def _escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
