"""``compare``: how alike adapters are, module by module and in all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Final

import numpy as np

from loratool.adapter.model import Adapter, unknown_scale
from loratool.adapter.problems import check_plain, check_sound
from loratool.base.told import open_told
from loratool.errors import AdapterError, LoratoolError, OptionError
from loratool.files.places import located
from loratool.files.sources import fetch
from loratool.math.clustering import average_linkage, leaf_order
from loratool.names.strengths import Weights, with_strengths
from loratool.plan.devices import exactly, mover_to
from loratool.plan.threads import in_parallel, usual_threads
from loratool.schemes.folders import Place, is_collection, places
from loratool.schemes.opening import open_adapter
from loratool.verbs.algebra.modules import Joint, join
from loratool.verbs.arguments import one_or_more
from loratool.verbs.comparison.modules import (
    NAN_HINT,
    Deltas,
    Directions,
    Mover,
    Products,
    compare_modules,
    continued,
    cosine,
    deltas_of,
    like,
    multiply,
)
from loratool.verbs.comparison.result import Comparison, ModuleComparison, Pair

__all__ = ["Comparison", "ModuleComparison", "Pair", "compare"]

AnyPath = str | PathLike[str]
Progress = Callable[[int, int], None]
HELD: Final = 64
"""How many modules' products are held at a time."""
MEMORY: Final = 1 << 30
"""Bytes of factors, as stored, that may be in work at a time, if more than one module is."""
APART: Final = 2.0
"""``1 - cosine`` of adapters for different models, which have no cosine: the largest there is."""


@exactly
def compare(
    adapters: Sequence[AnyPath] | AnyPath,
    *,
    recursive: bool = False,
    weights: Weights = (),
    directions: int | None = None,
    random: int | None = None,
    alpha: float | None = None,
    adapter_name: str | None = None,
    base: AnyPath | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare the deltas of two adapters or more; no delta is ever formed.

    Inner products come from r × r Gram matrices, distances from the core of both deltas
    together, so that even nearly equal adapters have a distance with all its digits. A module
    that one adapter lacks is zero there. Every factor is read once, however many adapters.

    Of three or more, those that cannot be read are told and left out.

    Args:
        adapters: Files or folders; one alone with ``random``. Of a folder that is no adapter,
            every adapter in it is one, and each two are compared as a whole.
        recursive: Look into all folders.
        weights: As in :func:`compose`: deltas are compared as strong as they would be used.
        directions: Up to how many leading singular directions φ(i, j) is tabulated; by default
            8 of each, and 64 of the larger of two unequal ranks.
        random: A seed: compare one adapter with random matrices of its shapes, ranks and norms,
            or tell for two what φ is by chance.
        alpha: Alpha where none is recorded.
        adapter_name: Which adapter, where a path holds several.
        base: The model that they are for, whose headers alone are read: its names settle flattened
            paths, and llama.cpp's files need what it says of itself.
        device: ``auto`` (the processor), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: Number of modules in work at a time.
        progress: Called with how much is done and how much there is.

    Raises:
        LoratoolError: Fewer than two adapters can be read, or two are for different bases.
    """
    given: Sequence[AnyPath] = one_or_more(adapters)
    folders = [_is_folder_of_adapters(path, recursive, adapter_name) for path in given]
    is_pair = len(given) <= 2 and not recursive and not any(folders)
    paths: list[Place] = []
    for path, is_folder in zip(given, folders, strict=True):
        paths += _inside(path, recursive) if is_folder else [Place(Path(path), str(path))]
    if len(paths) < 2 and (random is None or not paths):
        raise OptionError(
            "compare",
            "needs two adapters or more",
            hint="one alone goes with --random or --layers",
        )
    if len(paths) > 2 and random is not None:
        raise OptionError("--random", "goes with one adapter or two")
    if directions is not None and directions < 1:
        raise OptionError("--directions", f"{directions} is less than 1")
    names, opened, unread = _opened(
        paths, is_pair=is_pair, alpha=alpha, adapter_name=adapter_name, base=base
    )
    opened, strengths, left_out = with_strengths(opened, weights)
    models, notes = ([[*range(len(opened))]], []) if is_pair else _models(opened)
    joints: list[Joint] = []
    for members in models:
        found, told = join(
            [opened[place] for place in members],
            [strengths[place] for place in members],
            to_write=False,
        )
        joints += found
        notes += told
    notes = [*notes, *left_out, *_notes(opened)]
    if len(opened) == 1:
        names.append(f"random matrices (seed {random})")
    work = _Work(
        {id(adapter): place for place, adapter in enumerate(opened)},
        [str(adapter.path) for adapter in opened],
        Directions(directions),
        random,
        mover_to(device),
        is_pair=is_pair,
    )
    total = _Total.of(len(names))
    for joint, found_there in _computed(work, joints, threads, progress):
        total.add(joint, found_there, work)
    return total.comparison(names, models, unread, notes, is_pair=is_pair)


def _is_folder_of_adapters(path: AnyPath, recursive: bool, adapter_name: str | None) -> bool:
    """Whether a path stands for all adapters in it; what is not there is told when it is opened."""
    try:
        place = located(path)
    except LoratoolError:
        return False
    if recursive:
        return place.is_dir()
    return adapter_name is None and is_collection(place)


def _inside(path: AnyPath, recursive: bool) -> list[Place]:
    """Return the adapters in a folder, each of which goes by its whole path."""
    found = places([located(path)], recursive=recursive)
    return [replace(place, name=str(place.path)) for place in found]


def _opened(
    paths: Sequence[Place],
    *,
    is_pair: bool,
    alpha: float | None,
    adapter_name: str | None,
    base: AnyPath | None,
) -> tuple[list[str], list[Adapter], list[tuple[str, str]]]:
    """Return adapters with their paths, and of more than two those that cannot be read.

    Raises:
        LoratoolError: One of two cannot be read, or too few of more.
    """
    place_of_base = located(base) if base is not None else None
    model, told = (
        open_told(place_of_base, needs_weights=False) if place_of_base is not None else (None, None)
    )
    names: list[str] = []
    opened: list[Adapter] = []
    unread: list[tuple[str, LoratoolError]] = []
    for place in paths:
        try:
            if place.error is not None:
                raise place.error
            adapter = open_adapter(
                place.name,
                adapter_name=adapter_name,
                alpha=alpha,
                base_modules=model.paths if model is not None else (),
                base=told,
            )
            _check(adapter)
        except LoratoolError as error:
            if is_pair:
                raise
            unread.append((place.name, error))
        else:
            names.append(place.name)
            opened.append(adapter)
    is_mixed = len({adapter.scheme for adapter in opened}) > 1
    for index, adapter in reversed([*enumerate(opened)]):
        if is_mixed and adapter.unknown is not None:
            unknown = AdapterError(adapter.path, adapter.unknown, code="LT033")
            if is_pair:
                raise unknown
            unread.append((names.pop(index), unknown))
            del opened[index]
    if len(opened) < 2 and unread:
        raise unread[0][1]
    fetch(path for adapter in opened for path in adapter.stamps)
    return names, opened, [(path, str(error)) for path, error in unread]


def _check(adapter: Adapter) -> None:
    for site in adapter.sites:
        check_sound(site, adapter)
        if not site.is_plain:
            check_plain(site, adapter, is_named=False)


def _models(adapters: Sequence[Adapter]) -> tuple[list[list[int]], list[str]]:
    """Return the places of adapters that are for one model, for each of the models, and notes."""
    everyone = [*range(len(adapters))]
    if _refusal(adapters) is None:
        return [everyone], []
    models, notes = _grouped(adapters, seen=1)
    if any(_refusal([adapters[place] for place in members]) for members in models):
        # the first of a model may go with what does not go together: it tells too little
        models, notes = _grouped(adapters, seen=len(adapters))
    return models, notes


def _grouped(adapters: Sequence[Adapter], *, seen: int) -> tuple[list[list[int]], list[str]]:
    """Return the same, where an adapter is for a model if it goes with the first ``seen`` of it."""
    models: list[list[int]] = []
    notes: list[str] = []
    for place, adapter in enumerate(adapters):
        why: LoratoolError | None = None
        for members in models:
            refusal = _refusal([*(adapters[each] for each in members[:seen]), adapter])
            if refusal is None:
                members.append(place)
                break
            why = why or refusal
        else:
            models.append([place])
            if why is not None:
                notes.append(f"{adapter.path} is compared with none of those before: {why}")
    return models, notes


def _refusal(adapters: Sequence[Adapter]) -> LoratoolError | None:
    """Return why adapters cannot be for one model, if they cannot."""
    try:
        join(adapters, to_write=False)
    except LoratoolError as error:
        return error
    return None


@dataclass(frozen=True, slots=True)
class _Found:
    """What was found at one module: products of all, and the first two compared."""

    products: Products
    squared: float | None = None
    module: ModuleComparison | None = None


@dataclass(frozen=True, slots=True)
class _Work:
    """What is done at every module.

    Attributes:
        places: Place of an adapter by its ``id``.
        paths: What the adapters are called in messages.
        directions: How many directions are tabulated.
        seed: Of random matrices, if any are wanted.
        mover: Brings an array to where it is computed with.
        is_pair: Whether two are compared module by module.
    """

    places: Mapping[int, int]
    paths: Sequence[str]
    directions: Directions
    seed: int | None
    mover: Mover
    is_pair: bool

    def at(self, joint: Joint) -> _Found:
        """Compare all adapters at one module.

        Raises:
            AdapterError: Of two, one is not finite.
        """
        deltas: dict[int, Deltas] = {**deltas_of(joint, self.places, self.mover)}
        count = len(self.paths)
        if count == 1 and self.seed is not None:
            count, deltas[1] = 2, like(joint.name, deltas[0], self.seed)
        products = multiply(deltas, count)
        if not self.is_pair:
            return _Found(products)
        for place, problem in products.problems.items():
            where = self.paths[min(place, len(self.paths) - 1)]
            raise AdapterError(f"{where}: {joint.name}", problem, hint=NAN_HINT, code="LT017")
        if len(deltas) < 2:
            return _Found(products)
        squared, module = compare_modules(
            joint.name, deltas[0], deltas[1], self.directions, self.seed
        )
        return _Found(products, squared, module)


def _computed(
    work: _Work, joints: Sequence[Joint], threads: int | None, progress: Progress | None
) -> Iterator[tuple[Joint, _Found]]:
    """Yield what was found at every module, in order, a few of them in memory at a time."""
    sizes = [joint.nbytes for joint in joints]
    whole = sum(sizes)
    largest = max(sizes, default=1)
    most = min(threads or usual_threads(sizes), max(1, MEMORY // max(1, largest)))
    for start in range(0, len(joints), HELD):
        stretch = slice(start, start + HELD)
        done = sum(sizes[:start])
        found = in_parallel(
            work.at,
            joints[stretch],
            threads=most,
            progress=continued(progress, done, whole),
            sizes=sizes[stretch],
        )
        yield from zip(joints[stretch], found, strict=True)


@dataclass(slots=True)
class _Total:
    """What all modules add up to.

    Attributes:
        inner: Products of each two adapters.
        squared: Their squared distances.
        shared: How many modules each two have in common.
        alone: By adapter, the modules that not all have.
        problems: Why the deltas of an adapter cannot be compared, by its place.
        modules: The modules that the first two share, compared.
    """

    inner: np.ndarray
    squared: np.ndarray
    shared: np.ndarray
    alone: list[list[str]]
    problems: dict[int, str] = field(default_factory=dict)
    modules: list[ModuleComparison] = field(default_factory=list)

    @staticmethod
    def of(count: int) -> _Total:
        """Return that of no modules."""
        square = (count, count)
        return _Total(
            np.zeros(square), np.zeros(square), np.zeros(square, int), [[] for _ in range(count)]
        )

    def add(self, joint: Joint, found: _Found, work: _Work) -> None:
        """Add what was found at one module."""
        count = len(self.inner)
        self.inner += found.products.inner
        squared = found.products.squared_distances
        if found.squared is not None:
            squared = np.array([[0.0, found.squared], [found.squared, 0.0]])
        self.squared += squared
        there = [work.places[id(term.adapter)] for term in joint.terms]
        there += [1] if len(work.paths) < count else []  # random matrices are like the others
        self.shared[np.ix_(there, there)] += 1
        if len(there) < count:
            for place in there:
                self.alone[place].append(joint.name)
        for place, problem in found.products.problems.items():
            self.problems.setdefault(place, f"{joint.name}: {problem}; {NAN_HINT}")
        if found.module is not None:
            self.modules.append(found.module)

    def comparison(
        self,
        names: Sequence[str],
        models: Sequence[Sequence[int]],
        unread: Sequence[tuple[str, str]],
        notes: Sequence[str],
        *,
        is_pair: bool,
    ) -> Comparison:
        """Return what is told of it, of those adapters whose deltas are finite.

        Raises:
            AdapterError: Fewer than two are.
        """
        kept = [place for place in range(len(names)) if place not in self.problems]
        gone = [(names[place], problem) for place, problem in sorted(self.problems.items())]
        if len(kept) < 2:
            raise AdapterError(*gone[0], code="LT017")
        norms = [math.sqrt(max(0.0, float(self.inner[place, place]))) for place in kept]
        model_of = {place: number for number, members in enumerate(models) for place in members}
        cosines: list[list[float | None]] = []
        distances: list[list[float | None]] = []
        for i, norm in zip(kept, norms, strict=True):
            is_one = [is_pair or model_of[i] == model_of[j] for j in kept]
            cosines.append(
                [
                    (1.0 if i == j and norm else cosine(float(self.inner[i, j]), norm, other))
                    if same
                    else None
                    for j, other, same in zip(kept, norms, is_one, strict=True)
                ]
            )
            distances.append(
                [
                    math.sqrt(float(self.squared[i, j])) if same else None
                    for j, same in zip(kept, is_one, strict=True)
                ]
            )
        apart = [
            [
                _apart(value, is_one=far is not None)
                for value, far in zip(row, distance, strict=True)
            ]
            for row, distance in zip(cosines, distances, strict=True)
        ]
        clusters = average_linkage(apart)
        first = distances[0][1]
        return Comparison(
            adapters=tuple(names[place] for place in kept),
            cosines=tuple(map(tuple, cosines)),
            distances=tuple(map(tuple, distances)),
            relative_distance=first / norms[0] if first is not None and norms[0] else None,
            modules=tuple(self.modules),
            shared=tuple(map(tuple, self.shared[np.ix_(kept, kept)].tolist())),
            only_in=tuple(tuple(self.alone[place]) for place in kept),
            norms=tuple(norms),
            clusters=clusters,
            order=leaf_order(clusters, apart),
            is_pair=is_pair,
            unread=(*unread, *gone),
            notes=tuple(dict.fromkeys(notes)),
        )


def _apart(value: float | None, *, is_one: bool) -> float:
    """Return how far apart two adapters are for a cluster; a delta of zero is like none."""
    if value is None:
        return 1.0 if is_one else APART
    return 1.0 - value


def _notes(adapters: Sequence[Adapter]) -> list[str]:
    notes = []
    for adapter in adapters:
        variants = {s.variant.name for s in adapter.sites if s.variant.undetermined}
        if variants:
            notes.append(
                f"{adapter.path}: {', '.join(sorted(variants))}: only B @ A is compared, for the "
                "rest of its delta depends on the base"
            )
        if adapter.config is not None and adapter.config.init.changes_base:
            notes.append(f"{adapter.path}: {adapter.config.init.refusal}; only B @ A is compared")
        if adapter.extras:
            notes.append(
                f"{adapter.path}: {len(adapter.extras)} tensors are no deltas and are not compared"
            )
        if unknown := unknown_scale(adapter):
            notes.append(f"{adapter.path}: {unknown}")
        notes += [f"{adapter.path}: {note}" for note in adapter.notes]
    return notes
