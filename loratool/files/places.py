"""Where what a user names is: on the disk, in the cache of the hub, or on the hub."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from loratool.errors import SPOKEN, HubError, MissingModelError, OutputError, StoreError
from loratool.files.sources import Source, forget, is_stood_for, stand_in
from loratool.files.targets import forget_targets, let_stand_for

if TYPE_CHECKING:
    from loratool.files.hub.names import HubName
    from loratool.files.hub.remote import HubFiles
    from loratool.files.objects.addresses import Address

__all__ = [
    "Origin",
    "called",
    "forget_stand_ins",
    "hub_as_json",
    "in_cache",
    "is_elsewhere",
    "located",
    "on_the_hub",
    "origin_of",
    "output_in_a_store",
]

EXTRA: Final = "pip install 'loratool[hub]'"
PREFIX: Final = "loratool-hub-"
WRITTEN: Final = "s3"
"""The kind of stores that outputs go to."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Which file or folder of the hub a path is.

    Attributes:
        repo: ``org/name``.
        commit: The commit.
        inside: The path in it; empty for all of it.
    """

    repo: str
    commit: str
    inside: str = ""

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:8]}{f'/{self.inside}' if self.inside else ''}"

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON documents have it."""
        return {"repo": self.repo, "commit": self.commit, "path": self.inside or None}


_folders: dict[Path, HubFiles] = {}
"""By the folder that stands for them."""
_known: dict[HubName, Path] = {}


def located(path: str | PathLike[str]) -> Path:
    """Return the path on the disk of what a user names; what is on the disk names itself.

    ``org/name[@revision][/inside]``, ``hf://…`` and addresses of the hub are looked for in the
    local cache. What it lacks is asked of the hub, of which nothing is fetched until it is read.
    So are files of object stores and web servers (``s3://…``, ``https://…``).

    Raises:
        StoreError: There is nothing at an address.
        HubError: It is named like a model of the hub, and cannot be had.
        OptionError: It is an address of something else.
    """
    text = os.fspath(path)
    place = Path(text)
    if os.path.lexists(text) or place.is_absolute() or "\0" in text:
        return place
    from loratool.files.hub.names import parse_hub_name

    if ":" in text:
        from loratool.files.objects.addresses import parse_address

        address = parse_address(text)
        if address is not None:
            return in_a_store(address)
    name = parse_hub_name(text)
    if name is None:
        return place
    if not name.is_told and _is_meant_here(place):
        return in_cache(name) or place
    return on_the_hub(name)


def in_cache(name: HubName) -> Path | None:
    """Return the path of a model of the hub that is whole in the local cache."""
    from loratool.files.hub.cache import cached, missing_in

    snapshot = cached(name)
    return snapshot.place if snapshot is not None and missing_in(snapshot) is None else None


def on_the_hub(name: HubName) -> Path:
    """Return the path on the disk of a model of the hub.

    Raises:
        HubError: It cannot be had.
    """
    from loratool.files.hub.cache import cached, missing_in, offline_by

    snapshot = cached(name)
    lack = missing_in(snapshot) if snapshot is not None else None
    if snapshot is not None and lack is None:
        return snapshot.place
    here = "" if name.is_told else "no such file or folder, and "
    where = f"{here}not in the local cache of the hub"
    if lack is not None:
        where = f"in the local cache of the hub, but {lack}"
    if (variable := offline_by()) is not None:
        raise MissingModelError(
            name,
            f"{where}, and {variable} is set",
            hint=_near(name) or f"without it, 'hf download {name.repo}' fetches it",
        )
    if name not in _known:
        try:
            from loratool.files.hub.remote import list_files

            files = list_files(name)
        except ModuleNotFoundError:
            hint = _near(name) or f"to fetch from the hub: {EXTRA}"
            raise MissingModelError(name, where, hint=hint) from None
        except HubError as error:
            raise type(error)(error.where, error.what, hint=_near(name) or error.hint) from None
        _known[name] = _stand_ins(files, name)
    return _known[name]


def called(path: str | PathLike[str]) -> str:
    """Return what a file or folder is called in what is written down, wherever it lies.

    Of one from the hub that is its name there at its commit, by which it is found again.
    """
    place = located(path)
    origin = origin_of(place)
    if origin is None:
        return place.resolve().name
    return f"{origin.repo}@{origin.commit}{f'/{origin.inside}' if origin.inside else ''}"


def _is_meant_here(place: Path) -> bool:
    """Whether what does not exist is meant on the disk, so that no stranger is asked for it."""
    from loratool.files.containers import is_weights

    return (len(place.parts) == 2 and is_weights(place)) or Path(place.parts[0]).is_dir()


def _near(name: HubName) -> str | None:
    """Return a hint at a path on the disk that is spelled almost like a name of the hub."""
    from loratool.files.missing import nearest_path

    near = nearest_path(Path(str(name))) if not name.is_told else None
    return f"did you mean {shlex.quote(str(near))}?" if near is not None else None


def _held(files: HubFiles, inside: str) -> str:
    """Return a hint at what a model holds in place of a file or folder that it does not."""
    from difflib import get_close_matches

    folders = {str(parent) for path in files.files for parent in PurePosixPath(path).parents}
    near = get_close_matches(inside, [*files.files, *(folders - {"."})], n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    top = sorted({path.partition("/")[0] for path in files.files})
    more = f" and {len(top) - 6} more" if len(top) > 6 else ""
    return f"it holds {', '.join(map(repr, top[:6]))}{more}"


def _stand_ins(files: HubFiles, name: HubName) -> Path:
    """Make a folder that stands for the files of a model, and return what is meant in it.

    Raises:
        HubError: It has no such file or folder.
    """
    inside = name.inside
    meant = {
        path: file
        for path, file in files.files.items()
        if not inside or path == inside or path.startswith(f"{inside}/")
    }
    if not meant and inside:
        raise HubError(name, f"{files.repo} holds no {inside!r}", hint=_held(files, inside))
    if not meant:
        raise HubError(name, "it is empty")
    if inside in meant:  # what lies beside a file says what it is
        folder = inside.rpartition("/")[0]
        meant = {p: f for p, f in files.files.items() if p.rpartition("/")[0] == folder}
    shown = f"{files.repo}@{files.commit[:8]}"
    root = _stood(f"{files.repo.replace('/', '--')}/{files.commit}", shown, meant)
    _folders[root] = files
    return root / inside if inside else root


def _stood(folder: str, shown: str, sources: Mapping[str, Source]) -> Path:
    """Let files in a folder stand for others, and return it.

    Args:
        folder: What it is called.
        shown: What it is called to people.
        sources: The files by their paths in it.
    """
    root = _root() / folder
    folders = {str(parent) for path in sources for parent in PurePosixPath(path).parents}
    for path, source in sources.items():
        place = root / path
        if path in folders or is_stood_for(place, source):  # no disk holds both under one name
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        stand_in(place, source)
        _made.add(place)
    SPOKEN[str(root)] = shown
    return root


def in_a_store(address: Address) -> Path:
    """Return the path on the disk that stands for what is at an address.

    Raises:
        StoreError: There is nothing, or it cannot be had.
    """
    try:
        from loratool.files.objects.store import list_objects

        found = list_objects(address)
    except ModuleNotFoundError:
        raise StoreError(
            address, "is in no reach", hint="to read from stores: pip install 'loratool[remote]'"
        ) from None
    key = address.key
    meant = {
        path: file
        for path, file in found.files.items()
        if not key or path == key or path.startswith(f"{key}/")
    }
    if not meant:
        raise StoreError(address, "there is nothing", hint="look at the address")
    if key in meant:  # what lies beside a file says what it is
        folder = key.rpartition("/")[0]
        meant = {p: f for p, f in found.files.items() if p.rpartition("/")[0] == folder}
    root = _stood(_folder_of(address), address.root, meant)
    _drop({each for each in _made if root / key in each.parents} - {root / each for each in meant})
    return root / key if key else root


def _drop(gone: set[Path]) -> None:
    """Remove what stands for files that are there no more."""
    forget(gone)
    _made.difference_update(gone)
    for place in gone:
        place.unlink(missing_ok=True)


def output_in_a_store(text: str) -> Path:
    """Return the path on the disk that stands for an address as an output.

    Raises:
        OutputError: Nothing is written to such addresses.
    """
    from loratool.files.hub.names import is_safe
    from loratool.files.objects.addresses import parse_address

    address = parse_address(text)
    if address is None or address.kind != WRITTEN:
        hint = "write to the disk, and upload that"
        if text.startswith("hf:"):
            hint = "write to the disk, and upload that: hf upload REPOSITORY FOLDER"
        where = re.sub(":/+", "://", text, count=1)  # as a path it has lost one of them
        raise OutputError(where, "outputs go to the disk or to s3://", hint=hint)
    if not is_safe(f"{address.host}/{address.key}".removesuffix("/")):
        raise OutputError(text, "is no address of an output", hint="such as s3://bucket/merged")
    root = _root() / _folder_of(address)
    SPOKEN[str(root)] = address.root
    place = root / address.key if address.key else root
    let_stand_for(place, address)
    return place


def _folder_of(address: Address) -> str:
    return f"{address.kind}-{address.host.replace(':', '-')}"


_made: set[Path] = set()
_roots: list[Path] = []


def _root() -> Path:
    if not _roots:
        import atexit
        import tempfile

        _roots.append(Path(tempfile.mkdtemp(prefix=PREFIX)))
        atexit.register(forget_stand_ins)
    return _roots[0]


def is_elsewhere(path: Path) -> bool:
    """Whether a path stands for something that is in a store or on the hub."""
    return any(path.is_relative_to(root) for root in _roots)


def forget_stand_ins() -> None:
    """Remove what stands for files of the hub; they are asked for again where they are named."""
    for root in _roots:
        import shutil

        shutil.rmtree(root, ignore_errors=True)
    forget(_made)
    forget_targets()
    SPOKEN.clear()
    _roots.clear()
    _folders.clear()
    _known.clear()
    _made.clear()


def origin_of(path: Path) -> Origin | None:
    """Return what a path is on the hub; ``None`` for what is not from there."""
    for root, files in _folders.items():
        if path == root or root in path.parents:
            inside = path.relative_to(root).as_posix()
            return Origin(files.repo, files.commit, "" if inside == "." else inside)
    if "models--" not in str(path):
        return None
    from loratool.files.hub.cache import snapshot_of

    found = snapshot_of(path)
    return Origin(found.repo, found.commit, found.inside) if found is not None else None


def hub_as_json(paths: Mapping[str, Path], adapters: Sequence[Path] = ()) -> dict[str, Any] | None:
    """Return what came from the hub, for JSON documents; ``None`` where nothing did.

    Args:
        paths: What was read, by what it was.
        adapters: Adapters in their order, ``null`` for those that are not from the hub.
    """
    found = {what: origin.as_json() for what, path in paths.items() if (origin := origin_of(path))}
    origins = [origin_of(path) for path in adapters]
    listed = [origin.as_json() if origin is not None else None for origin in origins]
    return {**found, **({"adapters": listed} if any(listed) else {})} or None
