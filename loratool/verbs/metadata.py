"""``metadata``: what a file says of itself, shown or changed; its tensors keep their bytes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

from loratool.base.model import open_model
from loratool.display.document import Block, Column, Document, Facts, Lines, Table
from loratool.display.figures import human_bytes
from loratool.display.shown import Shown
from loratool.errors import AdapterError, OptionError, OutputError, UnsupportedError, spoken
from loratool.files.atomic import check_output, staged, sync_file
from loratool.files.container import Telling, WeightsFile
from loratool.files.containers import container_of, open_weights
from loratool.files.gguf import GgufFile
from loratool.files.inputs import InputFiles
from loratool.files.json import is_text
from loratool.files.links import link_roots, stays_inside
from loratool.files.places import located
from loratool.files.sources import is_stand_in, size_of, whole
from loratool.files.transfer import copy_range, read_into, write_all
from loratool.schemes import builtin_schemes
from loratool.schemes.detection import find_weights
from loratool.verbs.arguments import output_path
from loratool.write.metadata import is_hash, transferable

__all__ = ["FileMetadata", "MetadataReport", "metadata"]

AnyPath = str | PathLike[str]
LONGEST: Final = 160
"""Characters of a value that are shown."""
DATA_URL: Final = re.compile(r"data:image/(?P<kind>[\w.+-]+);base64,")
IMAGES: Final = {"/9j/": "jpeg", "iVBORw0KGgo": "png", "UklGR": "webp", "R0lGOD": "gif"}
"""What images begin with in base64."""
CHANGES: Final = (
    Column("key", folds=True),
    Column("before", folds=True),
    Column("after", folds=True),
)
SYNC_BELOW: Final = 64 << 20
OF_ANY: Final = "general."
OF_FORM: Final = ("architecture", "alignment", "file_type", "quantization_version", "type")
"""What a GGUF file says of its own tensors under names that all such files have."""


@dataclass(frozen=True, slots=True)
class FileMetadata:
    """What one weights file says of itself.

    Attributes:
        path: The file.
        metadata: By key what it says, or will say.
        before: What it said.
        header: What it begins with then, up to its data; empty where nothing is changed.
    """

    path: Path
    metadata: Mapping[str, str]
    before: Mapping[str, str]
    header: bytes = b""

    def changed(self) -> Iterator[tuple[str, str | None, str | None]]:
        """Yield keys that change, with what they say before and after."""
        for key in dict.fromkeys((*self.before, *self.metadata)):
            old, new = self.before.get(key), self.metadata.get(key)
            if old != new:
                yield key, old, new


@dataclass(frozen=True, slots=True)
class MetadataReport(Shown):
    """What files say of themselves, and what becomes of it.

    Attributes:
        path: What was asked about.
        files: Its weights files.
        output: Where the result is; ``None`` where nothing was asked for.
        is_written: Whether anything was written.
        notes: What a user should know.
    """

    path: Path
    files: tuple[FileMetadata, ...]
    output: Path | None = None
    is_written: bool = False
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return a document for scripts; of one file, its metadata stand by themselves."""
        document: dict[str, Any] = {
            "schema": 1,
            "path": str(self.path),
            "files": [
                {
                    "name": file.path.name,
                    "metadata": dict(file.metadata),
                    "changed": [
                        {"key": key, "before": old, "after": new}
                        for key, old, new in file.changed()
                    ],
                }
                for file in self.files
            ],
        }
        if len(self.files) == 1:
            document["metadata"] = dict(self.files[0].metadata)
        if self.output is not None:
            document |= {"output": spoken(str(self.output)), "dry_run": not self.is_written}
        return document | {"notes": list(self.notes)}

    def document(self) -> Document:
        """Return what people see of it: what files say, or what changes in that."""
        blocks: list[Block] = []
        changes = [list(file.changed()) for file in self.files]
        for file, changed in zip(self.files, changes, strict=True):
            title = "" if len(self.files) == 1 else file.path.name
            if self.output is not None:
                rows = [(key, _shown(old or ""), _shown(new or "")) for key, old, new in changed]
                blocks.append(Table.of(title, CHANGES, rows))
            elif file.metadata:
                pairs = ((key, _shown(value)) for key, value in sorted(file.metadata.items()))
                blocks.append(Facts(tuple(pairs), title))
            else:
                blocks.append(Lines((f"{file.path}: says nothing of itself",)))
        if self.output is not None:
            count = sum(map(len, changes))
            words = f"{self.output}: {count} key{'s' * (count != 1)} changed, tensors as they were"
            dry = "" if self.is_written else "dry run, nothing written; "
            blocks.append(Lines((f"{dry}{words}",)))
        return Document.of(blocks, self.notes)


def _shown(value: str) -> str:
    """Return a value as people see it: images by what they are, long texts by how they begin."""
    image = _image(value)
    if image is not None:
        return image
    if len(value) <= LONGEST:
        return value
    return f"{value[:LONGEST]}… ({len(value):,} characters)"


def _image(value: str) -> str | None:
    """Return what image a value is, in base64; ``None`` where it is none."""
    match = DATA_URL.match(value)
    data = value[match.end() :] if match is not None else value
    kind = match["kind"] if match is not None else None
    if kind is None and len(data) > LONGEST:
        kind = next((kind for start, kind in IMAGES.items() if data.startswith(start)), None)
    if kind is None:
        return None
    return f"image ({kind}), {human_bytes(len(data.rstrip('=')) * 3 // 4)}"


def metadata(
    path: AnyPath,
    output: AnyPath | None = None,
    *,
    set: Mapping[str, str] | None = None,
    remove: Sequence[str] = (),
    source: AnyPath | None = None,
    in_place: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> MetadataReport:
    """Return what the weights at ``path`` say of themselves, or change it.

    Only headers change: tensors keep their bytes and their order. What ``source`` says comes first,
    then ``remove``, then ``set``. Hashes that a file records of its tensors stay right.

    Args:
        path: A weights file, or a folder with an adapter or a model.
        output: Where the result goes; of a folder a folder with all of its files.
        set: By key what is to be said.
        remove: Keys that go.
        source: A file whose metadata are taken over, but for what is true of its own tensors.
        in_place: Change the file itself, in one rename.
        force: Replace an existing output.
        dry_run: Say what would change, and write nothing.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    place = located(path)
    opened = [open_weights(each) for each in _weights_of(place)]
    wanted = dict(set or {})
    is_edit = bool(wanted or remove or source is not None)
    if not is_edit and output is None and not in_place:
        files = tuple(FileMetadata(f.path, f.metadata, f.metadata) for f in opened)
        return MetadataReport(place, files)
    _check_options(wanted, output, is_edit=is_edit, in_place=in_place, dry_run=dry_run)
    notes: list[str] = []
    taken = _taken(located(source), notes) if source is not None else {}
    files = tuple(_edited(file, taken, remove, wanted) for file in opened)
    target = place if in_place or output is None else output_path(output)
    if not dry_run and in_place:
        for file, edited in zip(opened, files, strict=True):
            _replace(file, edited)
    elif not dry_run:
        notes += _write(place, opened, files, target, force=force)
    return MetadataReport(place, files, target, not dry_run, tuple(dict.fromkeys(notes)))


def _weights_of(path: Path) -> list[Path]:
    """Return the weights files that a path means: of an adapter, or all of a model.

    Raises:
        AdapterError: There are none.
    """
    try:
        return [find_weights(path)[0]]
    except AdapterError as error:
        if not path.is_dir():
            raise
        try:
            return [shard.path for shard in open_model(path).shards]
        except Exception:
            raise error from None


def _check_options(
    wanted: Mapping[str, str],
    output: AnyPath | None,
    *,
    is_edit: bool,
    in_place: bool,
    dry_run: bool,
) -> None:
    if not is_edit:
        raise OptionError("metadata", "say what to change: --set, --remove or --from")
    if output is not None and in_place:
        raise OptionError("metadata", "--output and --in-place both say where the result goes")
    if output is None and not in_place and not dry_run:
        raise OptionError("metadata", "say where the result goes: --output, or --in-place")
    for key, value in wanted.items():
        if not key or not is_text(key) or not is_text(value):
            raise OptionError("--set", f"{key!r}: keys and values have to be text")
        if is_hash(key):
            raise OptionError(
                "--set", f"{key} is computed from the tensors, and nothing else can be right"
            )


def _taken(path: Path, notes: list[str]) -> dict[str, str]:
    """Return what another file says and may be said of this one."""
    found = open_weights(_weights_of(path)[0])
    if isinstance(found, GgufFile):
        own = tuple(f"{OF_ANY}{name}" for name in OF_FORM)
        taken = {k: v for k, v in found.metadata.items() if k.startswith(OF_ANY) and k not in own}
    else:
        taken = transferable(found.metadata)
    left = sorted(found.metadata.keys() - taken.keys())
    if left:
        notes.append(
            f"{path}: {len(left)} keys are about its own tensors and were not taken over, such as "
            f"{left[0]!r}"
        )
    return taken


def _edited(
    file: WeightsFile,
    taken: Mapping[str, str],
    remove: Sequence[str],
    wanted: Mapping[str, str],
) -> FileMetadata:
    """Return what a file will say.

    Raises:
        UnsupportedError: Its format has no place for that.
        OptionError: A key to remove is not there.
    """
    container = container_of(file.path)
    if not isinstance(container, Telling):
        raise UnsupportedError(
            file.path,
            f"is a {container.name}, which has no place for metadata",
            hint="convert it to safetensors first: loratool convert ADAPTER --to SCHEME "
            "-o OUT.safetensors",
        )
    changes: dict[str, str | None] = dict(taken)
    for key in remove:
        if key not in file.metadata and key not in taken:
            raise OptionError("--remove", f"{file.path.name} says nothing under {key!r}")
        changes[key] = None
    changes |= wanted
    changes |= _hashes(file, {**file.metadata, **changes})
    said = {k: v for k, v in {**file.metadata, **changes}.items() if v is not None}
    return FileMetadata(file.path, said, file.metadata, container.beginning(file, changes))


def _hashes(file: WeightsFile, said: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the hashes that a file records, computed anew: some depend on what else it says."""
    recorded = {key for key, value in said.items() if value is not None and is_hash(key)}
    if not recorded:
        return {}
    found: dict[str, str | None] = {}
    specs = [stored.spec for stored in file.tensors.values()]
    start = _start(file)
    texts = {key: value for key, value in said.items() if value is not None}
    files = InputFiles({file.path: file.stamp})
    try:
        with files.using(file.path) as descriptor:

            def read(offset: int, into: memoryview) -> None:
                read_into(descriptor, into, start + offset, path=file.path)

            for scheme in builtin_schemes():
                if scheme.seal is not None and recorded & scheme.seal.room.keys():
                    sealed = scheme.seal.close(read, file.size - start, specs, texts)
                    found |= {key: value for key, value in sealed.items() if key in recorded}
    finally:
        files.close()
    return found


def _start(file: WeightsFile) -> int:
    """Return where the data of a file begin."""
    return min((stored.offset for stored in file.tensors.values()), default=file.size)


def _replace(file: WeightsFile, edited: FileMetadata) -> None:
    """Put a changed file in the place of the one that it is made of.

    Raises:
        OutputError: It is a link, whose target others may use, or cannot be written.
    """
    if is_stand_in(file.path):
        raise OutputError(file.path, "is not on this disk", hint="write another one with --output")
    if file.path.is_symlink():
        raise OutputError(
            file.path,
            f"is a link to {file.path.resolve()}, which is not changed through it",
            hint="name that file, or write another one with --output",
        )
    with staged(file.path, folder=False, force=True, sync=True) as stage:
        _copy(file, edited, stage)
        stage.chmod(file.path.stat().st_mode & 0o7777)
        sync_file(stage)


def _copy(file: WeightsFile, edited: FileMetadata, target: Path) -> None:
    """Write a file with what it says now before its data."""
    start, header = _start(file), edited.header
    files = InputFiles({file.path: file.stamp})
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, memoryview(header), 0)
        with files.using(file.path) as source:
            copy_range(source, descriptor, start, len(header), file.size - start, path=file.path)
        files.check_unchanged()
    finally:
        files.close()
        os.close(descriptor)


def _write(
    path: Path,
    opened: Sequence[WeightsFile],
    edited: Sequence[FileMetadata],
    output: Path,
    *,
    force: bool,
) -> list[str]:
    """Write changed files at ``output``, and return what was left behind.

    Raises:
        OutputError: It is there, or of another kind than the input.
    """
    is_folder = path.is_dir()
    if not is_folder and output.suffix.lower() != path.suffix.lower():
        raise OutputError(
            output, f"the input is {path.suffix}, so the output is: end the name in {path.suffix}"
        )
    if is_folder and output.suffix.lower() == opened[0].path.suffix.lower():
        raise OutputError(
            output, f"the input is a folder, so the output is one; leave out {output.suffix!r}"
        )
    beside, left = _beside(path, opened) if is_folder else ([], [])
    needed = sum(file.size + len(new.header) for file, new in zip(opened, edited, strict=True))
    check_output(
        output,
        force=force,
        inputs=[path, *(file.path for file in opened)],
        needed=needed + sum(map(size_of, beside)),
        names=[str(each.relative_to(path)) for each in beside],
        folder=is_folder,
    )
    sync = needed < SYNC_BELOW
    with staged(output, folder=is_folder, force=force, sync=sync) as stage:
        for each in beside:
            target = stage / each.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole(each), target)
        for file, new in zip(opened, edited, strict=True):
            target = stage / file.path.relative_to(path) if is_folder else stage
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(file, new, target)
            if sync:
                sync_file(target)
    return left


def _beside(folder: Path, opened: Sequence[WeightsFile]) -> tuple[list[Path], list[str]]:
    """Return the other files of a folder, and what is not copied."""
    weights = [file.path for file in opened]
    roots = link_roots(folder, weights)
    found, left = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or path in weights:
            continue
        if path.is_symlink() and not stays_inside(path, roots):
            left.append(f"{name} was not copied: it is a link that leaves the folder")
        elif path.is_file():
            found.append(path)
    return found, left
