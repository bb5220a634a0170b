"""The arithmetic of one module: its exact delta, the factors that are written, their error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.adapter.slots import Slot
from loratool.errors import AdapterError, MergeError
from loratool.files.spec import StoredTensor
from loratool.math.combining import Settings, combine, peft_linear
from loratool.math.factored import Factored, factor, norm
from loratool.math.lowrank import LowRank
from loratool.math.namespace import array_namespace, beside, double, on_host, padded
from loratool.math.randomness import generator_for
from loratool.plan.factors import site_deltas
from loratool.plan.host import DOUBLE
from loratool.values.arrays import Rounded, decode
from loratool.verbs.algebra.modules import Joint

if TYPE_CHECKING:
    from loratool.values.expr import Array

__all__ = [
    "Method",
    "ModuleReport",
    "Spectrum",
    "SumOfDeltas",
    "exact_deltas",
    "joint_spectra",
    "load_terms",
    "values_of",
]

CANCELLED: Final = 1e-13
"""A sum this much smaller than its terms is their rounding: the terms cancel."""
UNITS: Final = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Largest relative error of rounding one number."""
Mover = Callable[["Array"], Any]


def on_processor(array: Array) -> Any:
    """Return an array where it is: the processor computes with numpy."""
    return array


@dataclass(frozen=True, slots=True)
class Method:
    """How deltas are combined, and where.

    Attributes:
        name: One of ``loratool.verbs.compose.METHODS``.
        settings: Density and so on.
        seed: Of the random methods.
        mover: Brings an array to where it is computed with.
    """

    name: str = "linear"
    settings: Settings = field(default_factory=Settings)
    seed: int = 0
    mover: Mover = on_processor


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What was written for one module, against what it should be.

    Attributes:
        module: Its name.
        rank: Rank that was written.
        from_rank: Rank at which nothing would have been lost.
        squared_norm: ``‖Δ‖_F²`` of the exact delta.
        squared_error: ``‖written - Δ‖_F²``, rounding to the dtype included.
        singular_values: Those that were kept, of the exact delta, descending.
        discarded: The others.
        cancelled: Whether the terms cancel, so that the exact delta is zero.
        squared_distance: ``‖written - Σ weight · Δ‖_F²``, for methods other than the sum.
    """

    module: str
    rank: int
    from_rank: int
    squared_norm: float
    squared_error: float
    singular_values: tuple[float, ...]
    discarded: tuple[float, ...]
    cancelled: bool = False
    squared_distance: float | None = None

    @property
    def relative_error(self) -> float:
        """``‖written - Δ‖ / ‖Δ‖``; 0 where Δ is zero."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    def scaled(self, module: str, factor: float) -> ModuleReport:
        """Return the report of a module whose delta is this one times ``factor``."""
        size = abs(factor)
        return replace(
            self,
            module=module,
            squared_norm=self.squared_norm * size**2,
            squared_error=self.squared_error * size**2,
            singular_values=tuple(value * size for value in self.singular_values),
            discarded=tuple(value * size for value in self.discarded),
        )

    @staticmethod
    def joined(reports: Sequence[ModuleReport]) -> ModuleReport:
        """Return one report for all experts of a module."""
        if len(reports) == 1:
            return reports[0]
        distances = [r.squared_distance for r in reports if r.squared_distance is not None]
        return ModuleReport(
            reports[0].module,
            reports[0].rank,
            reports[0].from_rank,
            math.fsum(r.squared_norm for r in reports),
            math.fsum(r.squared_error for r in reports),
            tuple(sorted((v for r in reports for v in r.singular_values), reverse=True)),
            tuple(sorted((v for r in reports for v in r.discarded), reverse=True)),
            all(r.cancelled for r in reports),
            math.fsum(distances) if distances else None,
        )


def load_terms(joint: Joint, method: Method | None = None) -> list[list[LowRank]]:
    """Return the delta of each term, for each expert, each with its own scale.

    Raises:
        AdapterError: A factor holds NaN or infinity.
    """
    mover = method.mover if method is not None else on_processor
    by_term = []
    for term in joint.terms:
        deltas = site_deltas(term.site, term.adapter, DOUBLE)
        for delta in deltas:
            if not (np.isfinite(delta.up).all() and np.isfinite(delta.down).all()):
                raise AdapterError(
                    f"{term.adapter.path}: {term.site.label}",
                    "holds NaN or infinity",
                    hint="loratool validate --deep names the tensors",
                    code="LT017",
                )
        by_term.append(
            [LowRank(mover(delta.up), mover(delta.down), delta.scale) for delta in deltas]
        )
    return [list(deltas) for deltas in zip(*by_term, strict=True)]


def stacked(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return ``Σ weight · delta`` as one pair of float64 factors; B carries all scales."""
    xp = array_namespace(deltas[0].up)
    pairs = list(zip(deltas, weights, strict=True))
    return LowRank(
        xp.concat([double(d.up) * (w * d.scale) for d, w in pairs], axis=1),
        xp.concat([double(delta.down) for delta in deltas], axis=0),
    )


def exact_deltas(joint: Joint, method: Method) -> list[Factored]:
    """Return what the method makes of a module's deltas, exactly, for each expert."""
    weights = [term.weight for term in joint.terms]
    return [
        _exact(joint, index, deltas, weights, method)[1]
        for index, deltas in enumerate(load_terms(joint, method))
    ]


def joint_spectra(joint: Joint, method: Method) -> list[list[float]]:
    """Return the singular values of a module's delta, for each expert."""
    return [values_of(delta) for delta in exact_deltas(joint, method)]


def values_of(delta: Factored) -> list[float]:
    """Return singular values as numbers."""
    values: list[float] = on_host(delta.singular_values).tolist()
    return values


def _exact(
    joint: Joint, expert: int, deltas: list[LowRank], weights: list[float], method: Method
) -> tuple[LowRank | None, Factored]:
    """Return exact factors, where the method has such, and the decomposed delta."""
    if method.name == "linear":
        factors = stacked(deltas, weights)
        return factors, factor(factors)
    if method.name == "peft-linear":
        ranks = {delta.rank for delta in deltas}
        if len(ranks) > 1:
            raise AdapterError(
                joint.name,
                f"has ranks {', '.join(map(str, sorted(ranks)))}; peft-linear adds factor to "
                "factor and needs one rank",
                hint="use --method linear, which is exact for any ranks",
            )
        factors = peft_linear(deltas, weights)
        return factors, factor(factors)
    drawn = generator_for(method.seed, joint.name, expert)
    return None, combine(method.name, deltas, weights, method.settings, drawn)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A module whose factors are copied: nothing is lost, and its spectrum is reported."""

    joint: Joint

    @property
    def name(self) -> str:
        """The module."""
        return self.joint.name

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The stored factors."""
        return self.joint.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of them."""
        return self.joint.nbytes

    def compute(self) -> tuple[tuple[Array, ...], ModuleReport]:
        """Return no tensors, and the report."""
        rank = self.joint.full_rank
        reports = []
        for deltas in load_terms(self.joint):
            delta = factor(stacked(deltas, [1.0]))
            values = tuple(values_of(delta))
            rank = deltas[0].rank
            reports.append(ModuleReport(self.name, rank, rank, delta.squared_norm, 0.0, values, ()))
        return (), ModuleReport.joined(reports)


@dataclass(frozen=True, eq=False)
class SumOfDeltas:
    """A module's combined delta at a rank: A, B, and the bias beside B if it has one.

    Attributes:
        joint: The module, with what each adapter adds to it.
        rank: The rank that is written.
        method: How the deltas are combined.
    """

    joint: Joint
    rank: int
    method: Method

    @property
    def name(self) -> str:
        """The module."""
        return self.joint.name

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The stored tensors of all terms."""
        return self.joint.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of them."""
        return self.joint.nbytes

    @np.errstate(over="ignore", invalid="ignore")
    def compute(self) -> tuple[tuple[Array, ...], ModuleReport]:
        """Return A, B (and the bias) as they are after rounding, and what was lost.

        Raises:
            AdapterError: A factor is not finite.
            MergeError: The dtype cannot hold the result.
        """
        joint = self.joint
        weights = [term.weight for term in joint.terms]
        ups, downs, reports = [], [], []
        for expert, deltas in enumerate(load_terms(joint, self.method)):
            factors, delta = _exact(joint, expert, deltas, weights, self.method)
            gross = math.fsum(abs(w) * norm(term) for w, term in zip(weights, deltas, strict=True))
            written, error = self._written(factors, delta)
            ups.append(on_host(written.up))
            downs.append(on_host(written.down))
            distance = None
            if self.method.name != "linear":
                distance = factor(stacked(deltas, weights)).squared_distance(written)
            reports.append(self._report(delta, error, gross, distance))
        down = np.concatenate(downs, axis=0) if len(downs) > 1 else downs[0]
        up = np.stack(ups, axis=2).reshape(ups[0].shape[0], -1) if len(ups) > 1 else ups[0]
        made = [("A", down), ("B", up)]
        if joint.shape.has_bias:
            made.append(("its bias", _rounded(_bias(joint), joint.shape.dtype)))
        for what, array in made:
            if not np.isfinite(array).all():
                raise MergeError(
                    joint.name,
                    f"{what} overflows in {joint.shape.dtype}",
                    hint="write it with --dtype float32 (or bfloat16)"
                    if joint.shape.dtype == "F16"
                    else None,
                )
        return tuple(array for _, array in made), ModuleReport.joined(reports)

    def _written(self, factors: LowRank | None, delta: Factored) -> tuple[LowRank, float]:
        """Return the factors that are written, and their squared error."""
        dtype = self.joint.shape.dtype
        if factors is None or self.rank < self.joint.full_rank:
            best = _rounded_pair(delta.truncated(self.rank), dtype)
            return best, delta.squared_distance(best)
        exact = _padded(_narrowed(factors), self.rank)
        written = _rounded_pair(exact, dtype)
        if _equal(written.up, exact.up) and _equal(written.down, exact.down):
            return written, 0.0
        error = delta.squared_distance(written)
        if error > (2 * UNITS[dtype]) ** 2 * delta.squared_norm:
            # The terms nearly cancel, and the rounding of each is large against their sum; the
            # factors of the sum itself round better.
            other = _rounded_pair(delta.truncated(self.rank), dtype)
            if (better := delta.squared_distance(other)) < error:
                return other, better
        return written, error

    def _report(
        self, delta: Factored, error: float, gross: float, distance: float | None
    ) -> ModuleReport:
        values = values_of(delta)
        squared_norm = delta.squared_norm
        cancelled = gross > 0 and math.sqrt(squared_norm) <= CANCELLED * gross
        if cancelled:
            squared_norm = 0.0
        return ModuleReport(
            self.name,
            self.rank,
            self.joint.full_rank,
            squared_norm,
            error,
            tuple(values[: self.rank]),
            tuple(values[self.rank :]),
            cancelled,
            distance,
        )


def _equal(one: Any, other: Any) -> bool:
    return bool((one == other).all())


def _rounded(values: Array, dtype: str) -> Array:
    return Rounded.of(values, dtype).values


def _rounded_pair(factors: LowRank, dtype: str) -> LowRank:
    """Return factors as they are once they are stored, times their scale, where they were."""
    both = []
    for array, scale in ((factors.up, 1.0), (factors.down, factors.scale)):
        rounded = _rounded(on_host(array) * scale if scale != 1 else on_host(array), dtype)
        both.append(beside(rounded, array))
    return LowRank(both[0], both[1])


def _narrowed(factors: LowRank) -> LowRank:
    """Return the same delta with no more ranks than its smaller side: dense, and an identity."""
    rows, columns = factors.shape
    if factors.rank <= min(rows, columns):
        return factors
    dense = factors.dense()
    xp = array_namespace(dense)
    side = xp.eye(min(rows, columns), dtype=dense.dtype, device=dense.device)
    return LowRank(dense, side) if columns <= rows else LowRank(side, dense)


def _padded(factors: LowRank, rank: int) -> LowRank:
    if factors.rank >= rank:
        return factors
    rows, columns = factors.shape
    return LowRank(padded(factors.up, rows, rank), padded(factors.down, rank, columns))


def _bias(joint: Joint) -> Array:
    """Return ``Σ weight · scale · bias``, ``(out,)`` float64."""
    total = np.zeros(joint.shape.out)
    for term in joint.terms:
        stored = term.site.slots.get(Slot.UP_BIAS)
        if stored is not None:
            total += decode(stored) * (term.weight * term.site.scaling.factor)
    return total
