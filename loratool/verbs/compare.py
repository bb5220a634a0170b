"""``compare``: how alike adapters are, module by module and in all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

from loratool.adapter.model import Adapter, unknown_scale
from loratool.adapter.problems import check_sound
from loratool.base.told import open_told
from loratool.display.shown import Shown
from loratool.errors import AdapterError, OptionError
from loratool.files.places import located
from loratool.files.sources import fetch
from loratool.math.factored import Factored, factor, inner
from loratool.math.lowrank import LowRank
from loratool.math.namespace import on_host
from loratool.math.ranks import numerical_rank
from loratool.math.similarity import overlap, subspace_similarity
from loratool.names.strengths import Weights, with_strengths
from loratool.plan.devices import exactly, mover_to
from loratool.plan.factors import site_deltas
from loratool.plan.host import DOUBLE
from loratool.plan.threads import in_parallel
from loratool.schemes.opening import open_adapter
from loratool.verbs.algebra.modules import Joint, join
from loratool.verbs.algebra.sums import values_of
from loratool.verbs.arguments import one_or_more

if TYPE_CHECKING:
    from loratool.display.document import Document

__all__ = ["Comparison", "ModuleComparison", "compare"]

AnyPath = str | PathLike[str]
Progress = Callable[[int, int], None]
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class ModuleComparison:
    """One module in which two adapters are compared.

    Attributes:
        module: Its name.
        cosine: ``⟨Δ₁, Δ₂⟩ / (‖Δ₁‖ ‖Δ₂‖)``; ``None`` where a delta is zero.
        relative_distance: ``‖Δ₁ - Δ₂‖ / ‖Δ₁‖``; ``None`` where the first is zero.
        subspace_similarity: φ of the whole subspaces, the mean of both sides.
        phi_left: φ(i, j) of the leading left singular vectors (those of B).
        phi_right: φ(i, j) of the leading right singular vectors (those of A).
        norms: ``‖Δ‖_F`` of each.
    """

    module: str
    cosine: float | None
    relative_distance: float | None
    subspace_similarity: float | None
    phi_left: Matrix
    phi_right: Matrix
    norms: tuple[float, float]


@dataclass(frozen=True)
class Comparison(Shown):
    """What a comparison found.

    Attributes:
        adapters: Paths as they were given.
        cosines: Cosines of the whole deltas of each two adapters; ``None`` where one is zero.
        relative_distance: ``‖Δ₁ - Δ₂‖ / ‖Δ₁‖`` of the first two, over all modules.
        modules: The modules that the first two share; empty where more are compared.
        only_in: For each adapter the modules that not all of the others have.
        norms: ``‖Δ‖_F`` of each adapter.
        notes: What a user should know.
    """

    adapters: tuple[str, ...]
    cosines: tuple[tuple[float | None, ...], ...]
    relative_distance: float | None
    modules: tuple[ModuleComparison, ...]
    only_in: tuple[tuple[str, ...], ...]
    norms: tuple[float, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def cosine(self) -> float | None:
        """The cosine of the first two."""
        return self.cosines[0][1]

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises, and more."""
        return {
            "schema": 1,
            "adapters": list(self.adapters),
            "cosine": self.cosine,
            "relative_distance": self.relative_distance,
            "cosines": [list(row) for row in self.cosines],
            "norms": list(self.norms),
            "modules": [
                {
                    "module": module.module,
                    "cosine": module.cosine,
                    "relative_distance": module.relative_distance,
                    "subspace_similarity": module.subspace_similarity,
                    "phi_left": [list(row) for row in module.phi_left],
                    "phi_right": [list(row) for row in module.phi_right],
                    "norms": list(module.norms),
                }
                for module in self.modules
            ],
            "only_in": [list(names) for names in self.only_in],
            "notes": list(self.notes),
        }

    def document(self, *, unfolded: bool = False) -> Document:
        """Return what people see of it; ``unfolded`` gives every module a row."""
        from loratool.verbs.comparison.shown import comparison_document

        return comparison_document(self, unfolded=unfolded)


@exactly
def compare(
    adapters: Sequence[AnyPath] | AnyPath,
    *,
    weights: Weights = (),
    directions: int = 8,
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
    that one adapter lacks is zero there.

    Args:
        adapters: Files or folders.
        weights: As in :func:`compose`: deltas are compared as strong as they would be used.
        directions: Up to how many leading singular directions φ(i, j) is tabulated.
        alpha: Alpha where none is recorded.
        adapter_name: Which adapter, where a path holds several.
        base: The model that they are for, whose headers alone are read: its names settle flattened
            paths, and llama.cpp's files need what it says of itself.
        device: ``auto`` (the processor), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: Number of modules in work at a time.
        progress: Called with how much is done and how much there is.

    Raises:
        LoratoolError: An adapter cannot be read, or they are for different bases.
    """
    adapters = one_or_more(adapters)
    if len(adapters) < 2:
        raise OptionError("compare", "needs two adapters or more")
    if directions < 1:
        raise OptionError("--directions", f"{directions} is less than 1")
    base = located(base) if base is not None else None
    model, told = open_told(base, needs_weights=False) if base is not None else (None, None)
    opened = [
        open_adapter(
            path,
            adapter_name=adapter_name,
            alpha=alpha,
            base_modules=model.paths if model is not None else (),
            base=told,
        )
        for path in adapters
    ]
    fetch(path for adapter in opened for path in adapter.stamps)
    is_mixed = len({adapter.scheme for adapter in opened}) > 1
    for adapter in opened:
        if is_mixed and adapter.unknown is not None:
            raise AdapterError(adapter.path, adapter.unknown, code="LT033")
        for site in adapter.sites:
            check_sound(site, adapter)
    opened, strengths, left_out = with_strengths(opened, weights)
    joints, notes = join(opened, strengths, to_write=False)
    mover = mover_to(device)
    found = in_parallel(
        lambda joint: _products(joint, opened, directions, mover),
        joints,
        threads=threads,
        progress=progress,
        sizes=[joint.nbytes for joint in joints],
    )
    grams = [gram for gram, _ in found]
    count = len(opened)
    total = [[math.fsum(gram[i][j] for gram in grams) for j in range(count)] for i in range(count)]
    squared = math.fsum(pair.squared_distance for _, pair in found)
    norms = [math.sqrt(max(0.0, total[i][i])) for i in range(count)]
    return Comparison(
        adapters=tuple(str(path) for path in adapters),
        cosines=tuple(
            tuple(
                1.0 if i == j and norms[i] else _cosine(total[i][j], norms[i], norms[j])
                for j in range(count)
            )
            for i in range(count)
        ),
        relative_distance=math.sqrt(squared) / norms[0] if norms[0] else None,
        modules=tuple(pair.module for _, pair in found if pair.module is not None)
        if count == 2
        else (),
        only_in=tuple(
            tuple(
                joint.name
                for joint in joints
                if len(joint.terms) < count and any(t.adapter is adapter for t in joint.terms)
            )
            for adapter in opened
        ),
        norms=tuple(norms),
        notes=tuple(dict.fromkeys([*notes, *left_out, *_notes(opened)])),
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    """What the first two adapters differ in at one module."""

    squared_distance: float
    module: ModuleComparison | None


def _products(
    joint: Joint, adapters: Sequence[Adapter], directions: int, mover: Callable[[Any], Any]
) -> tuple[list[list[float]], _Pair]:
    """Return the Gram matrix of all adapters' deltas of a module, and the first two compared."""
    by_adapter: dict[int, list[LowRank]] = {}
    for term in joint.terms:
        index = next(i for i, adapter in enumerate(adapters) if adapter is term.adapter)
        by_adapter[index] = [
            LowRank(mover(delta.up), mover(delta.down), delta.scale * term.weight)
            for delta in site_deltas(term.site, term.adapter, DOUBLE)
        ]
    count = len(adapters)
    gram = [[0.0] * count for _ in range(count)]
    for i, first in by_adapter.items():
        for j, second in by_adapter.items():
            if j >= i:
                product = math.fsum(inner(a, b) for a, b in zip(first, second, strict=True))
                if not math.isfinite(product):
                    raise AdapterError(
                        f"{adapters[i].path}: {joint.name}",
                        "holds NaN or infinity" if i == j else "has a product that is not finite",
                        hint="loratool validate --deep names the tensors",
                        code="LT017",
                    )
                gram[i][j] = gram[j][i] = product
    one, other = by_adapter.get(0), by_adapter.get(1)
    if one is None or other is None:
        alone = gram[0][0] if other is None else gram[1][1]
        return gram, _Pair(alone, None)
    return gram, _compare_module(joint.name, one, other, gram, directions)


def _compare_module(
    name: str,
    one: Sequence[LowRank],
    other: Sequence[LowRank],
    gram: Sequence[Sequence[float]],
    directions: int,
) -> _Pair:
    firsts, seconds = [factor(delta) for delta in one], [factor(delta) for delta in other]
    squared = math.fsum(
        first.squared_distance(delta) for first, delta in zip(firsts, other, strict=True)
    )
    norms = (math.sqrt(max(0.0, gram[0][0])), math.sqrt(max(0.0, gram[1][1])))
    lefts, rights, whole = [], [], []
    for first, second in zip(firsts, seconds, strict=True):
        ranks = (_rank(first), _rank(second))
        if all(ranks):
            left, right, similarity = _overlaps(first, second, ranks, directions)
            lefts.append(left)
            rights.append(right)
            whole.append(similarity)
    module = ModuleComparison(
        module=name,
        cosine=_cosine(gram[0][1], *norms),
        relative_distance=math.sqrt(squared) / norms[0] if norms[0] else None,
        subspace_similarity=math.fsum(whole) / len(whole) if whole else None,
        phi_left=_mean(lefts),
        phi_right=_mean(rights),
        norms=norms,
    )
    return _Pair(squared, module)


def _overlaps(
    first: Factored, second: Factored, ranks: tuple[int, int], directions: int
) -> tuple[list[list[float]], list[list[float]], float]:
    left, right = overlap(first, second, min(directions, *ranks))
    return (
        on_host(left).tolist(),
        on_host(right).tolist(),
        subspace_similarity(first, second, ranks),
    )


def _rank(delta: Factored) -> int:
    return numerical_rank([value * value for value in values_of(delta)])


def _mean(matrices: Sequence[Sequence[Sequence[float]]]) -> Matrix:
    """Return the mean over experts, as far as all have it."""
    if not matrices:
        return ()
    size = min(len(matrix) for matrix in matrices)
    return tuple(
        tuple(math.fsum(m[i][j] for m in matrices) / len(matrices) for j in range(size))
        for i in range(size)
    )


def _cosine(product: float, one: float, other: float) -> float | None:
    if not one or not other:
        return None
    return max(-1.0, min(1.0, product / one / other))


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
