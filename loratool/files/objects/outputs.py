"""Outputs in a store, which appear whole or not at all: the file that says what belongs to it last.

A store renames nothing. So all data is sent before anything can be seen, and then appears in an
order in which no part of it looks finished: what lies beside weights, weights, their index.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Final

from loratool.errors import LoratoolError, OutputError, OutputExistsError
from loratool.files.belonging import check_contents
from loratool.files.checkpoint import is_index
from loratool.files.containers import is_weights
from loratool.files.objects.bucket import Bucket, writable
from loratool.files.objects.parts import SENT_BYTES, Part, parts_of
from loratool.files.objects.store import ObjectFile
from loratool.files.objects.upload import Sender, Upload
from loratool.files.targets import target_of
from loratool.files.transfer import describe_write_error, read_into

__all__ = ["Publication", "check_object", "stored"]

PREFIX: Final = "loratool-out-"
Content = bytes | ObjectFile
"""What a small object holds: bytes, or what another one in the store does."""


def check_object(
    path: Path,
    *,
    force: bool,
    inputs: Iterable[Path],
    names: Iterable[str] = (),
    kinds: Collection[str] = (),
    folder: bool = False,
) -> None:
    """Make sure that an output in a store may be written; see :func:`check_output`.

    Raises:
        OutputError: It exists, or is an input.
        StoreError: The store does not tell.
    """
    for source in dict.fromkeys(inputs):
        if source == path or source in path.parents or path in source.parents:
            raise OutputError(path, f"would overwrite the input {source}", hint="choose another")
    bucket = _bucket_of(path)
    try:
        key = bucket.address.key
        inside = f"{key}/" if key else ""
        found = [*islice(bucket.names(inside), None if force else 1)]
        is_there = bool(key) and bucket.has(key)
    finally:
        bucket.close()
    if not force and (found or is_there):
        raise OutputExistsError(path, "exists already", hint="choose another name, or give --force")
    is_ours = path.suffix.lower() in kinds if kinds else is_weights(path)
    if is_there and (folder or not is_ours):
        what = "is a file, and the output is a folder" if folder else "is another kind of file"
        raise OutputExistsError(path, f"{what}; it is not replaced", hint="choose another name")
    check_contents(path, (name.removeprefix(inside) for name in found), frozenset(names))


def _bucket_of(path: Path) -> Bucket:
    address = target_of(path)
    assert address is not None, path
    return writable(address)


@contextmanager
def stored(path: Path, *, folder: bool, force: bool) -> Iterator[Path]:
    """Give a fresh place on the disk; on success what is written there becomes ``path``.

    Raises:
        OutputError: There is something at ``path`` already.
        StoreError: The store does not take it.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=PREFIX) as stage:
            place = Path(stage) if folder else Path(stage) / path.name
            yield place
            with Publication(path, folder=folder, force=force) as publication:
                publication.send_files(place)
    except LoratoolError:
        raise
    except OSError as error:
        raise describe_write_error(path, error) from None


class Publication:
    """An output that is sent to a store, and then published; without that nothing is left of it.

    Args:
        path: What stands for it.
        folder: Whether it is a folder, else it is one file.
        force: Whether it replaces what is there.

    Attributes:
        sender: What sends it.
    """

    def __init__(self, path: Path, *, folder: bool, force: bool) -> None:
        self.sender = Sender()
        self._path = path
        self._folder = folder
        self._force = force
        self._bucket = _bucket_of(path)
        self._uploads: dict[str, Upload] = {}
        self._made: list[str] = []

    def __enter__(self) -> Publication:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.sender.close()
        for upload in self._uploads.values():
            upload.abort()
        if kind is not None and self._made and not self._force:
            with suppress(LoratoolError):
                self._bucket.delete(self._made)
        self._bucket.close()

    def key(self, name: str) -> str:
        """Return the key of a file of the output."""
        key = self._bucket.address.key
        return "/".join(filter(None, (key, name))) if self._folder else key

    def upload(
        self,
        name: str,
        parts: Sequence[Part],
        fill: Callable[[int, memoryview], None],
        written: Iterable[tuple[int, int]] = (),
    ) -> Upload:
        """Begin a large file of the output; see :class:`Upload`."""
        made = Upload(self._bucket, self.key(name), parts, fill, written)
        self._uploads[name] = made
        return made

    def publish(self, contents: Mapping[str, Content]) -> None:
        """Let all of it appear, the index last, once what was begun is sent.

        Args:
            contents: Small files by their names.

        Raises:
            OutputExistsError: Something has appeared there.
            StoreError: The store does not take it.
        """
        self.sender.wait()
        names = [*contents, *self._uploads]
        old = self._begin_replacing()
        for rank in sorted({_rank(name) for name in names}):
            for name in names:
                if _rank(name) == rank:
                    self.sender.submit(self._appearing(name, contents))
            self.sender.wait()
        self._bucket.delete([key for key in old if key not in self._made])

    def _appearing(self, name: str, contents: Mapping[str, Content]) -> Callable[[], None]:
        def appear() -> None:
            key, content = self.key(name), contents.get(name)
            if content is None:
                self._uploads[name].complete(is_new=not self._force)
            elif isinstance(content, ObjectFile):
                self._bucket.copy(key, content, is_new=not self._force)
            else:
                self._bucket.put(key, content, is_new=not self._force)
            self._made.append(key)

        return appear

    def _begin_replacing(self) -> list[str]:
        """Return what is there; what makes it a whole model or adapter is deleted."""
        if not (self._force and self._folder):
            return []
        old = list(self._bucket.names(f"{self.key('')}/".lstrip("/")))
        ends = max((_rank(key) for key in old), default=0)
        self._bucket.delete([key for key in old if _rank(key) == ends])
        return [key for key in old if _rank(key) != ends]

    def send_files(self, place: Path) -> None:
        """Send files of the disk, and publish them."""
        small: dict[str, Content] = {}
        for path in sorted(place.rglob("*")) if self._folder else [place]:
            name = path.relative_to(place).as_posix() if self._folder else path.name
            if path.is_dir():
                continue
            size = path.stat().st_size
            if size <= SENT_BYTES:
                small[name] = path.read_bytes()
            else:
                self._send_file(name, path, size)
        self.publish(small)

    def _send_file(self, name: str, path: Path, size: int) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

        def fill(start: int, view: memoryview) -> None:
            read_into(descriptor, view, start, path=path)

        try:
            upload = self.upload(name, parts_of(size, ()), fill)
            for index in upload.ready:
                upload.do(index, self.sender)
        finally:
            os.close(descriptor)


def _rank(name: str) -> int:
    """Return when a file appears: after all others those that say that the rest is there."""
    path = PurePosixPath(name)
    return 2 if is_index(path.name) else int(is_weights(path))
