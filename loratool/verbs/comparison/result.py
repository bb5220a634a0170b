"""What a comparison found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratool.display.shown import Shown
from loratool.math.clustering import Joining
from loratool.names.kinds import positions_of

if TYPE_CHECKING:
    from loratool.display.document import Document

__all__ = ["Baseline", "Comparison", "Matrix", "ModuleComparison", "Pair"]

Matrix = tuple[tuple[float, ...], ...]
Table = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True)
class Baseline:
    """What φ is where nothing is alike but by chance.

    Attributes:
        expected_left: The mean of φ(i, j) of random left subspaces, ``max(i, j) / out``.
        expected_right: The same of right ones, ``max(i, j) / in``.
        expected_similarity: That of the whole subspaces, the mean of both sides.
        random_left: φ(i, j) of the first delta and a seeded random one with the shape and rank
            of the second.
        random_right: The same of the right side.
        random_similarity: That of the whole subspaces.
    """

    expected_left: Matrix
    expected_right: Matrix
    expected_similarity: float
    random_left: Matrix
    random_right: Matrix
    random_similarity: float

    def as_json(self) -> dict[str, Any]:
        """Return what the command line's JSON says of it."""
        return {
            "expected": {
                "subspace_similarity": self.expected_similarity,
                "phi_left": _lists(self.expected_left),
                "phi_right": _lists(self.expected_right),
            },
            "random": {
                "subspace_similarity": self.random_similarity,
                "phi_left": _lists(self.random_left),
                "phi_right": _lists(self.random_right),
            },
        }


@dataclass(frozen=True, slots=True)
class ModuleComparison:
    """One module in which two adapters are compared.

    Attributes:
        module: Its name.
        cosine: ``⟨Δ₁, Δ₂⟩ / (‖Δ₁‖ ‖Δ₂‖)``; ``None`` where a delta is zero.
        relative_distance: ``‖Δ₁ - Δ₂‖ / ‖Δ₁‖``; ``None`` where the first is zero.
        subspace_similarity: φ of the whole subspaces, the mean of both sides.
        phi_left: φ(i, j) of the leading left singular vectors (those of B): a row for each of
            the first, a column for each of the second.
        phi_right: φ(i, j) of the leading right singular vectors (those of A).
        norms: ``‖Δ‖_F`` of each.
        baseline: What chance makes of φ, where that was asked for.
    """

    module: str
    cosine: float | None
    relative_distance: float | None
    subspace_similarity: float | None
    phi_left: Matrix
    phi_right: Matrix
    norms: tuple[float, float]
    baseline: Baseline | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises, and more."""
        return {
            "module": self.module,
            "cosine": self.cosine,
            "relative_distance": self.relative_distance,
            "subspace_similarity": self.subspace_similarity,
            "phi_left": _lists(self.phi_left),
            "phi_right": _lists(self.phi_right),
            "norms": list(self.norms),
            **(self.baseline.as_json() if self.baseline is not None else {}),
        }


@dataclass(frozen=True, slots=True)
class Pair:
    """Two of several adapters.

    Attributes:
        first: Path of one.
        second: Path of the other.
        cosine: Of their whole deltas; ``None`` where one is zero, or they are for other models.
        relative_distance: ``‖Δ₁ - Δ₂‖ / ‖Δ₁‖``; ``None`` in the same cases.
        modules: How many modules both have.
        only_in: How many only the first has, and only the second.
    """

    first: str
    second: str
    cosine: float | None
    relative_distance: float | None
    modules: int
    only_in: tuple[int, int]

    def as_json(self) -> dict[str, Any]:
        """Return what the command line's JSON says of it."""
        return {
            "first": self.first,
            "second": self.second,
            "cosine": self.cosine,
            "relative_distance": self.relative_distance,
            "modules": self.modules,
            "only_in": list(self.only_in),
        }


@dataclass(frozen=True)
class Comparison(Shown):
    """What a comparison found.

    Attributes:
        adapters: Paths as they were given, of those that were compared.
        cosines: Cosines of the whole deltas of each two adapters; ``None`` where one is zero,
            or where the two are for different models.
        distances: ``‖Δ₁ - Δ₂‖_F`` of each two, over all modules.
        relative_distance: ``‖Δ₁ - Δ₂‖ / ‖Δ₁‖`` of the first two, over all modules.
        modules: The modules that the first two share; empty where more are compared.
        shared: How many modules each two share; on the diagonal, how many each has.
        only_in: For each adapter the modules that not all of the others have.
        norms: ``‖Δ‖_F`` of each adapter.
        clusters: Which adapters are alike, by average linkage of ``1 - cosine``.
        order: Places of the adapters, the like side by side.
        is_pair: Whether two were asked for, and are told module by module.
        unread: What could not be compared, and why.
        notes: What a user should know.
    """

    adapters: tuple[str, ...]
    cosines: Table
    distances: Table
    relative_distance: float | None
    modules: tuple[ModuleComparison, ...]
    shared: tuple[tuple[int, ...], ...]
    only_in: tuple[tuple[str, ...], ...]
    norms: tuple[float, ...]
    clusters: tuple[Joining, ...]
    order: tuple[int, ...]
    is_pair: bool
    unread: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def cosine(self) -> float | None:
        """The cosine of the first two."""
        return self.cosines[0][1]

    @property
    def pairs(self) -> Iterator[Pair]:
        """Each two of the adapters, in their order."""
        for i, first in enumerate(self.adapters):
            for j in range(i + 1, len(self.adapters)):
                distance, norm = self.distances[i][j], self.norms[i]
                both = self.shared[i][j]
                yield Pair(
                    first,
                    self.adapters[j],
                    self.cosines[i][j],
                    distance / norm if distance is not None and norm else None,
                    both,
                    (self.shared[i][i] - both, self.shared[j][j] - both),
                )

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what ``--jsonl`` has a line for: each two adapters, and what was not read."""
        if self.is_pair:
            yield self.as_json()
            return
        yield from (pair.as_json() for pair in self.pairs)
        yield from ({"path": path, "error": why} for path, why in self.unread)

    def document(self, *, unfolded: bool = False) -> Document:
        """Return what people see of it; ``unfolded`` gives every module a row."""
        from loratool.verbs.comparison.shown import comparison_document

        return comparison_document(self, unfolded=unfolded)

    def records(self) -> list[dict[str, Any]]:
        """Return flat rows, for a table or a DataFrame.

        One for each module that two adapters share; of several adapters, one for each two.
        """
        if not self.is_pair:
            return [
                {
                    **{k: v for k, v in pair.as_json().items() if k != "only_in"},
                    "only_in_first": pair.only_in[0],
                    "only_in_second": pair.only_in[1],
                }
                for pair in self.pairs
            ]
        positions = positions_of([module.module for module in self.modules])
        return [
            {
                "module": module.module,
                "section": position.section,
                "kind": position.kind,
                "layer": position.layer,
                "cosine": module.cosine,
                "relative_distance": module.relative_distance,
                "subspace_similarity": module.subspace_similarity,
                "first_norm": module.norms[0],
                "second_norm": module.norms[1],
                **_chances(module.baseline),
            }
            for module, position in zip(self.modules, positions, strict=True)
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises, and more."""
        document: dict[str, Any] = {
            "schema": 1,
            "adapters": list(self.adapters),
            "cosine": self.cosine,
            "relative_distance": self.relative_distance,
            "cosines": _lists(self.cosines),
            "norms": list(self.norms),
            "modules": [module.as_json() for module in self.modules],
            "only_in": [list(names) for names in self.only_in],
            "notes": list(self.notes),
        }
        if self.is_pair:
            return document
        return {
            **document,
            "distances": _lists(self.distances),
            "order": list(self.order),
            "clusters": [
                {
                    "first": joining.first,
                    "second": joining.second,
                    "distance": joining.distance,
                    "size": joining.size,
                }
                for joining in self.clusters
            ],
            "items": [pair.as_json() for pair in self.pairs],
            "unread": [{"path": path, "error": why} for path, why in self.unread],
        }


def _chances(baseline: Baseline | None) -> dict[str, float]:
    if baseline is None:
        return {}
    return {
        "expected_similarity": baseline.expected_similarity,
        "random_similarity": baseline.random_similarity,
    }


def _lists(rows: Table | Matrix) -> list[list[float | None]]:
    return [list(row) for row in rows]
