"""A plan that is carried out in a store: what is untouched is copied there, and the rest sent.

From headers alone each weights file is divided into parts. A part that an object of the same store
has already is copied by the store; the others are put together in memory, of what is computed and
of the few bytes around that, and sent while others are computed.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.files.inputs import Extent, InputFiles, Stamp
from loratool.files.objects.outputs import Content, Publication
from loratool.files.objects.parts import Kept, Part, parts_of
from loratool.files.objects.store import ObjectFile
from loratool.files.objects.upload import Sender, Upload
from loratool.files.places import WRITTEN
from loratool.files.sources import fetch, source_of, whole
from loratool.files.transfer import read_into
from loratool.plan.digests import WholeTask
from loratool.plan.lanes import ByteRange, Spot
from loratool.plan.outcome import Outcome
from loratool.plan.run import FileWork, RunResult, joined_ranges, run_files
from loratool.plan.sidecar import Sidecar, read_whole
from loratool.plan.threads import Progress

if TYPE_CHECKING:
    from loratool.plan.plan import Plan
    from loratool.plan.run import Run

__all__ = ["Object", "copyable", "is_streamed", "objects_of", "upload", "upload_files"]


def is_streamed(works: Sequence[FileWork]) -> bool:
    """Whether all files have only a header around their data, which needs no look at these."""
    return all(work.header for work in works)


@dataclass(frozen=True)
class Object:
    """One weights file as an object.

    Attributes:
        work: What is to be done for it.
        written: Where bytes begin and end that are computed, in order.
        ranges: What is copied into it, in order.
        parts: What it is put together of.
    """

    work: FileWork
    written: tuple[tuple[int, int], ...]
    ranges: tuple[ByteRange, ...]
    parts: tuple[Part, ...]

    def fill(self, start: int, view: memoryview, files: InputFiles) -> None:
        """Put into memory the bytes from ``start`` on that nobody computes.

        Raises:
            LoratoolError: They cannot be read.
        """
        header = self.work.header[start : start + len(view)]
        view[: len(header)] = header
        for piece in self._pieces(start, start + len(view)):
            with files.using(piece.source) as source:
                into = view[piece.offset - start : piece.offset - start + piece.size]
                read_into(source, into, piece.source_offset, path=piece.source)

    def _pieces(self, start: int, stop: int) -> Iterator[ByteRange]:
        """Yield what is copied of some bytes."""
        first = bisect_right(self.ranges, start, key=lambda each: each.offset)
        for each in self.ranges[max(0, first - 1) :]:
            begin, end = max(start, each.offset), min(stop, each.offset + each.size)
            if each.offset >= stop:
                return
            if begin < end:
                skipped = begin - each.offset
                yield replace(
                    each,
                    source_offset=each.source_offset + skipped,
                    size=end - begin,
                    position=each.position + skipped,
                )

    def reads(self) -> Iterator[Extent]:
        """Yield what is read into its parts that are sent."""
        for part in self.parts:
            if part.kept is None:
                for piece in self._pieces(part.start, part.stop):
                    yield piece.source, piece.source_offset, piece.size


def objects_of(works: Sequence[FileWork]) -> list[Object]:
    """Return the weights files of a plan as objects."""
    written: list[list[tuple[int, int]]] = [[] for _ in works]
    for work in works:
        for task in work.tasks:
            for spot in task.written:
                if spot.spec.nbytes:
                    written[spot.file].append((spot.offset, spot.offset + spot.spec.nbytes))
    return [_object(work, sorted(spans)) for work, spans in zip(works, written, strict=True)]


def _object(work: FileWork, written: list[tuple[int, int]]) -> Object:
    ranges = tuple(joined_ranges(work.moves, joins=True))
    source = copyable(work.original) if work.original is not None else None
    if source is not None:  # what fills up the file too is there already
        ends = [0, *(stop for _, stop in written)]
        begins = [*(start for start, _ in written), work.size]
        kept = [Kept(a, b - a, source, a) for a, b in zip(ends, begins, strict=True) if a < b]
    else:
        kept = [
            Kept(each.offset, each.size, found, each.source_offset)
            for each in ranges
            if (found := copyable(each.source)) is not None
        ]
    if work.seal is not None:  # which tells the header when everything else is there
        written = [(0, len(work.header)), *written]
        kept = [each for each in kept if each.start >= len(work.header)]
    return Object(work, tuple(written), ranges, parts_of(work.size, kept))


def copyable(path: Path) -> ObjectFile | None:
    """Return the object behind a path, where the store that is written to can copy it."""
    source = source_of(path)
    if isinstance(source, ObjectFile) and source.store.address.kind == WRITTEN:
        return source
    return None


def content_of(sidecar: Sidecar) -> Content:
    """Return what a file beside the weights holds: its bytes, or the object that has them."""
    if sidecar.source is None:
        return sidecar.content or b""
    return copyable(sidecar.source) or whole(sidecar.source).read_bytes()


def upload(
    plan: Plan,
    works: Sequence[FileWork],
    outcome: Outcome,
    output: Path,
    *,
    force: bool,
    allow_nonfinite: bool,
    device: str,
    threads: int | None,
    progress: Progress | None,
) -> Outcome:
    """Carry out a plan in a store, whole or not at all; see :func:`loratool.plan.plan.write`.

    Raises:
        LoratoolError: Nothing was written that looks whole; the message says why.
    """
    hashed = plan.history.hashed if plan.history is not None else ()
    fetch(read_whole(plan.stamps, hashed, ()))
    with Publication(output, folder=plan.is_folder, force=force) as publication:
        outcome.weights = upload_files(
            works,
            publication,
            plan.stamps,
            allow_nonfinite=allow_nonfinite,
            device=device,
            threads=threads,
            progress=progress,
        )
        plan.check(outcome)
        beside = (*plan.beside(), *plan.telling(outcome))
        publication.publish({each.name: content_of(each) for each in beside})
    return outcome


def upload_files(
    works: Sequence[FileWork],
    publication: Publication,
    stamps: Mapping[Path, Stamp],
    *,
    allow_nonfinite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Carry out ``works``; what comes out is sent, and not published yet.

    Raises:
        LoratoolError: An input changed or ended, a result is not finite, or it cannot be sent.
    """
    sink = _UploadSink(objects_of(works), publication, InputFiles(stamps))
    try:
        result = run_files(
            sink.works(),
            sink,
            stamps,
            allow_nonfinite=allow_nonfinite,
            device=device,
            threads=threads,
            progress=progress,
        )
        sink.seal()
        publication.sender.wait()
        sink.files.check_unchanged()  # by now the store has copied all that it copies
    finally:
        sink.files.close()
    return result


class _UploadSink:
    """Puts parts of objects together."""

    joins = True

    def __init__(
        self, objects: Sequence[Object], publication: Publication, files: InputFiles
    ) -> None:
        self.objects = objects
        self.files = files
        self.sender = publication.sender
        self.uploads = [self._begun(each, publication) for each in objects]

    def _begun(self, made: Object, publication: Publication) -> Upload:
        def fill(start: int, view: memoryview) -> None:
            made.fill(start, view, self.files)

        return publication.upload(made.work.name, made.parts, fill, made.written)

    def works(self) -> list[FileWork]:
        """Return what is to be done: parts that are ready, then what is computed."""
        found = []
        for made, upload in zip(self.objects, self.uploads, strict=True):
            for extent in made.reads():
                self.files.expect(extent)
            tasks = [_PartTask(upload, index, self.sender) for index in upload.ready]
            work = replace(made.work, moves=(), original=None, tasks=[*tasks, *made.work.tasks])
            found.append(work)
        return found

    def seal(self) -> None:
        """Write the headers that only the end tells."""
        for made, upload in zip(self.objects, self.uploads, strict=True):
            if made.work.seal is not None:
                upload.write(0, memoryview(_sealed(made.work)), self.sender)

    def copy(self, piece: ByteRange, files: InputFiles) -> None:
        """See :class:`Sink`; nothing is copied but by parts."""
        raise NotImplementedError

    def write(self, spot: Spot, position: int, data: memoryview) -> None:
        """See :class:`Sink`."""
        self.uploads[spot.file].write(spot.offset + position, data, self.sender)

    def clone(self, file: int, original: Path, files: InputFiles) -> bool:
        """See :class:`Sink`."""
        return False


class _PartTask(WholeTask):
    """A part of which nothing is computed."""

    def __init__(self, upload: Upload, index: int, sender: Sender) -> None:
        super().__init__()
        self.upload = upload
        self.index = index
        self.sender = sender
        self.nbytes = self.effort = upload.parts[index].size

    def do(self, run: Run) -> None:
        self.upload.do(self.index, self.sender)
        run.count(self.nbytes)


def _sealed(work: FileWork) -> bytes:
    """Return the header of a file, as it is written into one without data."""
    assert work.seal is not None
    with tempfile.NamedTemporaryFile(prefix="loratool-header-") as file:
        file.truncate(work.size)
        work.seal(Path(file.name))
        return file.read(len(work.header))
