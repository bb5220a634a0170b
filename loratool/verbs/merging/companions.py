"""Trained weights beside an adapter: used where the base has a place for them, else named."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratool.adapter.build import strip_wrappers
from loratool.adapter.model import Adapter, Extra, ExtraKind
from loratool.adapter.saved import absent_heads, absent_modules
from loratool.base.model import Model
from loratool.errors import BaseModelError, LoratoolError
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import Stamp
from loratool.files.spec import StoredTensor
from loratool.schemes.companions import Companion, companions

__all__ = ["Accompanied", "accompanied"]


@dataclass(frozen=True, slots=True)
class Accompanied:
    """An adapter with what lies beside it.

    Attributes:
        adapter: The adapter; what its companions bring is among its extras.
        notes: What was used and what not, one sentence each.
        stamps: What the files were when their headers were read.
    """

    adapter: Adapter
    notes: tuple[str, ...]
    stamps: Mapping[Path, Stamp]


def accompanied(adapter: Adapter, base: Model, skip: Sequence[str]) -> Accompanied:
    """Return an adapter with the trained weights beside it that fit the base.

    Args:
        adapter: The adapter.
        base: The base.
        skip: Regular expressions; keys that match are left out.

    Raises:
        OptionError: One is no regular expression.
    """
    notes: list[str] = []
    used: list[Extra] = []
    stamps: dict[Path, Stamp] = {}
    skipped: list[str] = []
    beside: list[str] = []
    taken = {_place(extra.name, base) or extra.name for extra in adapter.extras}
    for companion in companions(adapter, skip):
        if _is_of_base(companion.path, base):
            continue
        beside += (*companion.tensors, *companion.skipped)
        skipped += companion.skipped
        if companion.stamp is not None:
            stamps[companion.path] = companion.stamp
        found = _Found.of(companion, adapter, base, taken)
        used += found.extras
        taken |= {extra.name for extra in found.extras}
        notes += found.notes()
    for name in (*absent_modules(adapter, beside), *absent_heads(adapter, beside)):
        notes.append(
            f"modules_to_save lists {name!r}, and no file holds it: what was trained of it is "
            "not in the result"
        )
    return Accompanied(
        replace(
            adapter,
            extras=(*adapter.extras, *used),
            skipped=(*adapter.skipped, *skipped),
        ),
        tuple(f"{adapter.path}: {note}" for note in notes),
        stamps,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """What a file beside an adapter comes to.

    Attributes:
        companion: The file.
        extras: What is used of it.
        homeless: Keys that the base has no place for.
        repeated: Keys of what the adapter brings already.
        problem: Why nothing of it is used; empty where something may be.
    """

    companion: Companion
    extras: tuple[Extra, ...] = ()
    homeless: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    problem: str = ""

    @staticmethod
    def of(companion: Companion, adapter: Adapter, base: Model, taken: Collection[str]) -> _Found:
        if companion.problem:
            return _Found(companion, problem=companion.problem)
        places = {key: _fitting(key, each, base) for key, each in companion.tensors.items()}
        adapted = {name for site in adapter.sites for name in _adapted(site.module, adapter, base)}
        model = next((key for key, place in places.items() if place in adapted), None)
        if model is not None:
            problem = f"it holds weights that the adapter adapts, such as {model!r}"
            return _Found(companion, problem=problem)
        extras = tuple(
            Extra(key, place, ExtraKind.FULL, companion.tensors[key])
            for key, place in places.items()
            if place is not None and place not in taken
        )
        homeless = tuple(key for key, place in places.items() if place is None)
        repeated = tuple(key for key, place in places.items() if place in taken)
        return _Found(companion, extras, homeless, repeated)

    def notes(self) -> Iterator[str]:
        """Yield what a user should know."""
        name = self.companion.path.name
        if self.problem:
            yield f"{name} lies beside it and was not used: {self.problem}"
        if self.extras:
            count, first = len(self.extras), self.extras[0].key
            yield f"{count} trained tensors of {name} were used, such as {first!r}"
        for keys, why in (
            (self.homeless, "the base has no place for them"),
            (self.repeated, "the adapter itself brings them"),
        ):
            if keys:
                yield f"{len(keys)} tensors of {name} were not used, for {why}, such as {keys[0]!r}"


def _is_of_base(path: Path, base: Model) -> bool:
    shards = (shard for checkpoint in base.checkpoints.values() for shard in checkpoint.shards)
    return any(path.samefile(shard.path) for shard in shards)


def _adapted(module: str, adapter: Adapter, base: Model) -> Iterator[str]:
    """Yield the tensors that an adapter changes, whichever naming the base has them in."""
    try:
        place = base.find(module, family=adapter.family)
    except LoratoolError:  # what cannot be merged is told where it is
        return
    yield from (piece.name for piece in place.pieces) if place is not None else ()


def _place(name: str, base: Model) -> str | None:
    """Return what the base calls a tensor; ``None`` where it has none, or may have several."""
    module, _, leaf = name.rpartition(".")
    try:
        return base.tensor(module, leaf) if module else None
    except BaseModelError:
        return None


def _fitting(key: str, stored: StoredTensor, base: Model) -> str | None:
    """Return the base's tensor in whose place a trained one can be."""
    name = strip_wrappers(key)
    for spelled in dict.fromkeys((name, name.removeprefix("base_model."))):
        place = _place(spelled, base)
        if place is not None:
            is_float = DTYPES[stored.spec.dtype].is_mergeable
            return place if is_float and stored.spec.shape == base.shape(place) else None
    return None
