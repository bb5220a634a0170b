"""How alike the layers of one adapter are: φ between modules of one kind."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from statistics import fmean
from typing import TYPE_CHECKING, Any

from loratool.adapter.model import Adapter
from loratool.adapter.problems import check_plain, check_sound
from loratool.base.told import open_told
from loratool.display.shown import Shown
from loratool.errors import AdapterError, OptionError
from loratool.files.places import located
from loratool.files.sources import fetch
from loratool.math.factored import factor
from loratool.math.namespace import Array, squared_norm
from loratool.math.similarity import expected_similarity
from loratool.names.kinds import Position, positions_of
from loratool.plan.devices import exactly, mover_to
from loratool.plan.threads import in_parallel
from loratool.schemes.opening import open_adapter
from loratool.verbs.algebra.modules import Joint, join
from loratool.verbs.comparison.modules import NAN_HINT, Mover, continued, deltas_of, rank
from loratool.verbs.comparison.result import Matrix

if TYPE_CHECKING:
    from loratool.display.document import Document

__all__ = ["KindOfModule", "LayerComparison", "compare_layers"]


@dataclass(frozen=True, slots=True)
class KindOfModule:
    """Modules of one kind and shape, in several layers.

    Attributes:
        kind: What they are in their layers: ``self_attn.q_proj``.
        shape: ``(out, in)`` of their deltas.
        modules: Their names.
        layers: Which layer each is in.
        directions: How many leading directions of each are compared.
        left: φ of the left subspaces (those of B) of each two, 1 on the diagonal.
        right: φ of the right ones (those of A).
    """

    kind: str
    shape: tuple[int, int]
    modules: tuple[str, ...]
    layers: tuple[str, ...]
    directions: tuple[int, ...]
    left: Matrix
    right: Matrix

    @property
    def expected(self) -> tuple[float, float]:
        """The mean of left and of right φ of random subspaces, over each two."""
        pairs = list(itertools.combinations(self.directions, 2))
        left, right = (
            fmean(expected_similarity(i, j, max(size, i, j)) for i, j in pairs)
            for size in self.shape
        )
        return left, right

    @property
    def mean(self) -> tuple[float, float]:
        """The mean of left and of right φ, over each two."""
        return _off_diagonal(self.left), _off_diagonal(self.right)

    @property
    def neighbours(self) -> tuple[float, float]:
        """The mean of left and of right φ of each layer and the next."""
        left, right = (
            fmean(matrix[i][i + 1] for i in range(len(matrix) - 1))
            for matrix in (self.left, self.right)
        )
        return left, right

    def as_json(self) -> dict[str, Any]:
        """Return what the command line's JSON says of it."""
        return {
            "kind": self.kind,
            "out_features": self.shape[0],
            "in_features": self.shape[1],
            "modules": list(self.modules),
            "layers": list(self.layers),
            "directions": list(self.directions),
            "phi_left": [list(row) for row in self.left],
            "phi_right": [list(row) for row in self.right],
            "mean_left": self.mean[0],
            "mean_right": self.mean[1],
            "expected_left": self.expected[0],
            "expected_right": self.expected[1],
        }


@dataclass(frozen=True, slots=True)
class LayerComparison(Shown):
    """How alike the layers of one adapter are.

    Attributes:
        adapter: Its path.
        kinds: Kinds of modules that at least two layers have.
        alone: Modules that are the only ones of their kind and shape, or zero.
        notes: What a user should know.
    """

    adapter: str
    kinds: tuple[KindOfModule, ...]
    alone: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def unread(self) -> tuple[tuple[str, str], ...]:
        """What could not be compared: nothing, for there is one adapter."""
        return ()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what ``--jsonl`` has a line for: each kind of module."""
        return (kind.as_json() for kind in self.kinds)

    def document(self, *, unfolded: bool = False) -> Document:
        """Return what people see of it; a kind has one row in any case."""
        from loratool.verbs.comparison.shown import layers_document

        return layers_document(self)

    def records(self) -> list[dict[str, Any]]:
        """Return flat rows, for a table or a DataFrame: one for each two modules of a kind."""
        return [
            {
                "kind": kind.kind,
                "first": kind.modules[i],
                "second": kind.modules[j],
                "first_layer": kind.layers[i],
                "second_layer": kind.layers[j],
                "phi_left": kind.left[i][j],
                "phi_right": kind.right[i][j],
            }
            for kind in self.kinds
            for i, j in itertools.combinations(range(len(kind.modules)), 2)
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the document of the command line's ``--json``."""
        return {
            "schema": 1,
            "adapter": self.adapter,
            "kinds": [kind.as_json() for kind in self.kinds],
            "alone": list(self.alone),
            "notes": list(self.notes),
        }


@exactly
def compare_layers(
    adapter: str | PathLike[str],
    *,
    directions: int | None = None,
    alpha: float | None = None,
    adapter_name: str | None = None,
    base: str | PathLike[str] | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LayerComparison:
    """Say how alike the subspaces of one adapter's layers are, for each kind of module.

    φ is that of :func:`compare`, between whole subspaces or their leading directions. Experts
    are compared with those of the same number.

    Args:
        adapter: File or folder.
        directions: At most so many leading directions; by default all that a delta has.
        alpha: Alpha where none is recorded.
        adapter_name: Which adapter, where a path holds several.
        base: The model that it is for, whose headers alone are read.
        device: ``auto`` (the processor), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: Number of modules in work at a time.
        progress: Called with how much is done and how much there is.

    Raises:
        LoratoolError: The adapter cannot be read, or a delta is not finite.
    """
    if directions is not None and directions < 1:
        raise OptionError("--directions", f"{directions} is less than 1")
    place = located(base) if base is not None else None
    model, told = open_told(place, needs_weights=False) if place is not None else (None, None)
    opened = open_adapter(
        adapter,
        adapter_name=adapter_name,
        alpha=alpha,
        base_modules=model.paths if model is not None else (),
        base=told,
    )
    for site in opened.sites:
        check_sound(site, opened)
        if not site.is_plain:
            check_plain(site, opened, is_named=False)
    fetch(opened.stamps)
    joints, notes = join([opened], to_write=False)
    mover = mover_to(device)
    groups = _groups(joints, opened)
    total = sum(joint.nbytes for joint in joints)
    kinds: list[KindOfModule] = []
    left_over: list[str] = []
    done = 0
    for label, members in groups.items():
        found = in_parallel(
            lambda member: _subspaces(member[0], opened, directions, mover),
            members,
            threads=threads,
            progress=continued(progress, done, total),
            sizes=[joint.nbytes for joint, _ in members],
        )
        done += sum(joint.nbytes for joint, _ in members)
        present = [(m, s) for m, s in zip(members, found, strict=True) if s.count]
        left_over += [
            joint.name for (joint, _), s in zip(members, found, strict=True) if not s.count
        ]
        if len(present) < 2:
            left_over += [joint.name for (joint, _), _ in present]
            continue
        kinds.append(_kind(label, present))
    alone = tuple(joint.name for joint in joints if joint.name in set(left_over))
    return LayerComparison(str(adapter), tuple(kinds), alone, (*notes, *opened.notes))


@dataclass(frozen=True, slots=True)
class _Subspaces:
    """The leading directions of a module, for each expert.

    Attributes:
        left: ``(out, count)`` each, orthonormal.
        right: ``(in, count)`` each.
        count: The fewest that an expert has.
    """

    left: tuple[Array, ...]
    right: tuple[Array, ...]
    count: int


Member = tuple[Joint, Position]


def _groups(joints: Sequence[Joint], adapter: Adapter) -> dict[str, list[Member]]:
    """Return modules of one kind, shape and expert together, by what they are called."""
    positions = positions_of([joint.name for joint in joints], adapter.components, adapter.family)
    found: dict[tuple[str, str, tuple[int, ...], tuple[int, int]], list[Member]]
    found = defaultdict(list)
    for joint, position in zip(joints, positions, strict=True):
        shape = (joint.shape.out, math.prod(joint.shape.into))
        found[position.component, position.kind, position.experts, shape].append((joint, position))
    names = [(component, kind, experts) for component, kind, experts, _ in found]
    groups: dict[str, list[Member]] = {}
    for (component, kind, experts, shape), members in found.items():
        label = " ".join(filter(None, (component, kind)))
        if experts:
            label += f" expert {'.'.join(map(str, experts))}"
        if names.count((component, kind, experts)) > 1:
            label += f" {shape[0]} × {shape[1]}"
        groups[label] = sorted(members, key=lambda member: _depth(member[1]))
    return groups


def _depth(position: Position) -> tuple[str, tuple[int, ...]]:
    """Return what layers are ordered by: the stretch of a U-Net, then their numbers."""
    return position.section, position.numbers


def _subspaces(joint: Joint, adapter: Adapter, most: int | None, mover: Mover) -> _Subspaces:
    (deltas,) = deltas_of(joint, {id(adapter): 0}, mover).values()
    try:
        factored = [factor(delta) for delta in deltas]
    except ValueError:
        raise AdapterError(
            f"{adapter.path}: {joint.name}", "holds NaN or infinity", hint=NAN_HINT, code="LT017"
        ) from None
    counts = [rank(delta) for delta in factored]
    count = min(counts if most is None else [*counts, most])
    sides = [delta.directions(count) for delta in factored]
    return _Subspaces(tuple(s[0] for s in sides), tuple(s[1] for s in sides), count)


def _kind(label: str, members: Sequence[tuple[Member, _Subspaces]]) -> KindOfModule:
    found = [subspaces for _, subspaces in members]
    joints = [joint for (joint, _), _ in members]
    positions = [position for (_, position), _ in members]
    sections = {position.section for position in positions}
    return KindOfModule(
        label,
        (joints[0].shape.out, math.prod(joints[0].shape.into)),
        tuple(joint.name for joint in joints),
        tuple(
            f"{p.section.partition(' ')[2]} {p.layer}".strip() if len(sections) > 1 else p.layer
            for p in positions
        ),
        tuple(subspaces.count for subspaces in found),
        _table([subspaces.left for subspaces in found]),
        _table([subspaces.right for subspaces in found]),
    )


def _table(sides: Sequence[Sequence[Array]]) -> Matrix:
    """Return φ of each two, the mean over experts."""
    table = [[1.0] * len(sides) for _ in sides]
    for i, j in itertools.combinations(range(len(sides)), 2):
        table[i][j] = table[j][i] = fmean(
            squared_norm(one.mT @ other) / min(one.shape[1], other.shape[1])
            for one, other in zip(sides[i], sides[j], strict=True)
        )
    return tuple(map(tuple, table))


def _off_diagonal(matrix: Matrix) -> float:
    return fmean(matrix[i][j] for i, j in itertools.combinations(range(len(matrix)), 2))
