"""PyTorch's distributed checkpoints (DCP): a folder of shards. They are only read.

``.metadata`` is a pickle of dataclasses, which are read as records: nothing in it is executed. It
says of every tensor its dtype, its shape and its blocks, and of every block the file, the offset
and the length of an archive of ``torch.save``. An archive is opened when its tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loratool.errors import FileFormatError, UnsupportedError, unreadable
from loratool.files.container import Container, Layout, WeightsFile
from loratool.files.dtypes import dtype_named
from loratool.files.gathered import ArchivedTensor, Gathered, Piece, cover
from loratool.files.inputs import Stamp, stamp_of
from loratool.files.links import STRAY_LINK, link_roots, stays_inside
from loratool.files.pickle_records import Pairs, Record, read_records
from loratool.files.pickles import WRAPPERS
from loratool.files.sources import opened
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.files.zip_entries import short

__all__ = ["CLAIM", "CONTAINER"]

CLAIM: Final = {"suffixes": [".metadata"]}

LONGEST: Final = 256 << 20
MOST: Final = 1 << 20
TENSOR: Final = "TensorStorageMetadata"
Place = tuple[str, tuple[int, ...]]
"""A tensor, and the index of the first element of one of its blocks."""


@dataclass(frozen=True, slots=True)
class _Archive:
    """Where a block is."""

    file: str
    begin: int
    length: int


@dataclass(slots=True)
class _Files:
    """The shards of a folder, looked at when they are named first.

    Attributes:
        path: The description.
        stamps: What they are.
    """

    path: Path
    stamps: dict[str, Stamp] = field(default_factory=dict)

    def stamp(self, name: str) -> Stamp:
        """Return what a shard is.

        Raises:
            FileFormatError: It lies elsewhere, or is missing.
        """
        if name not in self.stamps:
            if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
                raise FileFormatError(
                    self.path, f"names the shard {short(name)}: expected a plain file beside it"
                )
            shard = self.path.with_name(name)
            if shard.is_symlink() and not stays_inside(
                shard, link_roots(self.path.parent, [self.path])
            ):
                raise FileFormatError(shard, f"is {STRAY_LINK}, which is not followed")
            try:
                with opened(shard) as file:
                    self.stamps[name] = stamp_of(file)
            except OSError:
                raise FileFormatError(
                    shard,
                    "is missing: each process wrote a shard, and all of them are needed",
                    hint="copy the whole folder",
                ) from None
        return self.stamps[name]


class _Distributed:
    name: Final = "distributed checkpoint"
    keeps_codes: Final = False
    has_metadata: Final = False

    def open(self, path: Path) -> WeightsFile:
        """See :class:`Container`; nothing in it is executed."""
        try:
            with opened(path) as file:
                stamp = stamp_of(file)
                data = file.read(LONGEST + 1)
        except OSError as error:
            raise unreadable(path, error) from None
        if len(data) > LONGEST:
            raise FileFormatError(path, "its description is too long to be a checkpoint's")
        if not data.startswith(b"\x80"):
            raise FileFormatError(path, "is no description of a distributed checkpoint")
        whole = read_records(path, data)
        if not isinstance(whole, Record) or whole.kind != "Metadata":
            raise FileFormatError(path, "is no description of a distributed checkpoint")
        try:
            return _file(path, whole.fields, stamp)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(
                path, f"describes a checkpoint in a way that is not known: {error!r:.80}"
            ) from None

    def lay_out(
        self,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        name: str,
        like: WeightsFile | None = None,
    ) -> Layout:
        """See :class:`Container`; refuse to."""
        raise UnsupportedError(
            name, "would be a distributed checkpoint", hint="write a .safetensors file"
        )


def _file(path: Path, fields: Mapping[str, Any], stamp: Stamp) -> WeightsFile:
    described = {
        key: value
        for key, value in _pairs(fields["state_dict_metadata"])
        if isinstance(key, str) and isinstance(value, Record)
    }
    names, left = _names(described, fields.get("planner_data"))
    archives = _archives(path, fields["storage_data"])
    files = _Files(path)
    tensors = {
        name: _tensor(path, name, key, described[key], archives, files)
        for key, name in names.items()
    }
    size = stamp.size + sum(each.size for each in files.stamps.values())
    notes: tuple[str, ...] = ()
    if left:
        notes = (f"the checkpoint holds {len(left)} more entries, not used: {', '.join(left[:4])}",)
    others = {path.with_name(name): each for name, each in files.stamps.items()}
    return WeightsFile(path, tensors, {}, size, stamp, notes=notes, others=others)


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Record):  # an ordered dictionary, or one with a default
        value = value.state if isinstance(value.state, Pairs) else Pairs()
    if not isinstance(value, Pairs) or len(value.items) > MOST:
        raise TypeError("no dictionary")
    return value.items


def _names(described: Mapping[str, Record], planned: Any) -> tuple[dict[str, str], list[str]]:
    """Return the names of tensors by their keys, and the keys of everything else.

    A checkpoint of several things (a model, its optimizer) says of each key which path of
    dictionaries it stands for: of those only the model's are taken, without its own name.
    """
    paths: dict[str, tuple[Any, ...]] = {}
    if isinstance(planned, Pairs | Record):
        paths = {
            key: steps
            for key, steps in _pairs(planned)
            if isinstance(key, str) and isinstance(steps, tuple) and steps
        }
    tensors = [key for key, record in described.items() if record.kind == TENSOR]
    firsts = {str(paths[key][0]) for key in tensors if len(paths.get(key, ())) > 1}
    wrapper = next((name for name in WRAPPERS if name in firsts), None)
    is_mixed = any(len(paths.get(key, ())) == 1 and key.endswith("weight") for key in tensors)
    if wrapper is None or is_mixed:
        names = {key: key for key in tensors}
    else:
        names = {
            key: ".".join(map(str, paths[key][1:]))
            for key in tensors
            if len(paths.get(key, ())) > 1 and paths[key][0] == wrapper
        }
    return names, [key for key in described if key not in names]


def _archives(path: Path, stored: Any) -> dict[Place, _Archive]:
    """Return where blocks are, by the names of their tensors and the places in them."""
    found: dict[Place, _Archive] = {}
    for key, record in _pairs(stored):
        fields, place = record.fields, key.fields
        if fields.get("transform_descriptors"):
            raise FileFormatError(
                path,
                "its shards are compressed or encrypted by an extension, which is not read",
                hint="join it first: python -m torch.distributed.checkpoint.format_utils "
                "dcp_to_torch FOLDER OUT.pt",
            )
        numbers = fields["offset"], fields["length"]
        if not all(type(each) is int and 0 <= each < 1 << 48 for each in numbers):
            raise ValueError("an impossible place")
        first = () if place.get("offset") is None else _sizes(place["offset"])
        found[str(place["fqn"]), first] = _Archive(str(fields["relative_path"]), *numbers)
    return found


def _sizes(value: Any) -> tuple[int, ...]:
    """Return a ``torch.Size``."""
    if isinstance(value, Record):
        value = value.arguments[0] if value.arguments else ()
    sizes = tuple(value)
    if len(sizes) > 8 or not all(type(each) is int and 0 <= each < 1 << 48 for each in sizes):
        raise ValueError("an impossible size")
    return sizes


def _dtype(record: Record) -> str:
    """Return the dtype among properties, which are a tuple or named."""
    state = record.state
    value = state[0] if isinstance(state, tuple) else record.fields["dtype"]
    module, _, name = value.name.partition(".")
    dtype = dtype_named(name) if module == "torch" else None
    if dtype is None:
        raise ValueError(f"the dtype {value.name!r:.40}")
    return dtype.name


def _tensor(
    path: Path,
    name: str,
    key: str,
    record: Record,
    archives: Mapping[Place, _Archive],
    files: _Files,
) -> StoredTensor:
    """Return a tensor and where its blocks are.

    Raises:
        FileFormatError: They do not cover it, or a shard is missing or too short.
    """
    fields = record.fields
    spec = TensorSpec(name, _dtype(fields["properties"]), _sizes(fields["size"]))
    blocks = [(_sizes(c.fields["offsets"]), _sizes(c.fields["sizes"])) for c in fields["chunks"]]
    wrong = cover(spec.shape, blocks)
    if wrong:
        raise FileFormatError(path, f"tensor {short(name)}: {wrong}")
    pieces = []
    for first, shape in dict.fromkeys(blocks):
        archive = archives.get((key, first))
        if archive is None:
            raise FileFormatError(path, f"does not say where a piece of tensor {short(name)} is")
        stamp = files.stamp(archive.file)
        where = path.with_name(archive.file)
        if archive.begin + archive.length > stamp.size:
            raise FileFormatError(where, f"truncated: a piece of {short(name)} ends beyond it")
        part = TensorSpec(name, spec.dtype, shape)
        source = ArchivedTensor(part, where, archive.begin, archive.length, stamp)
        pieces.append(Piece(first, shape, source))
    return StoredTensor(spec, path, 0, whole=Gathered(spec, tuple(pieces)))


CONTAINER: Final[Container] = _Distributed()
