"""The arithmetic of one module: its exact delta, the factors that are written, their error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from loratool.adapter.slots import Slot
from loratool.errors import AdapterError, MergeError
from loratool.math.combining import Settings, combine, peft_linear
from loratool.math.factored import Factored, factor, norm
from loratool.math.lowrank import LowRank
from loratool.math.randomness import generator_for
from loratool.ops.algebra.joining import Joint
from loratool.ops.algebra.plan import ModuleJob
from loratool.ops.factors import site_deltas
from loratool.ops.tensors import Arithmetic, read_tensor, torch_dtype

__all__ = [
    "Method",
    "ModuleReport",
    "compute",
    "exact_deltas",
    "joint_spectra",
    "load_terms",
    "measure",
    "transposed",
]

CANCELLED: Final = 1e-13
"""A sum this much smaller than its terms is their rounding: the terms cancel."""
UNITS: Final = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Largest relative error of rounding one number."""


@dataclass(frozen=True, slots=True)
class Method:
    """How deltas are combined.

    Attributes:
        name: One of ``loratool.ops.compose.METHODS``.
        settings: Density and so on.
        seed: Of the random methods.
    """

    name: str = "linear"
    settings: Settings = field(default_factory=Settings)
    seed: int = 0


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


def load_terms(joint: Joint, kind: Arithmetic) -> list[list[LowRank]]:
    """Return the delta of each term, for each expert, each with its own scale.

    Raises:
        AdapterError: A factor holds NaN or infinity.
    """
    by_term = []
    for term in joint.terms:
        deltas = site_deltas(term.site, term.adapter, kind)
        for delta in deltas:
            if not (bool(delta.up.isfinite().all()) and bool(delta.down.isfinite().all())):
                raise AdapterError(
                    f"{term.adapter.path}: {term.site.label}",
                    "holds NaN or infinity",
                    hint="loratool validate --deep names the tensors",
                )
        by_term.append(deltas)
    return [list(deltas) for deltas in zip(*by_term, strict=True)]


def stacked(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return ``Σ weight · delta`` as one pair of float64 factors; B carries all scales."""
    return LowRank(
        torch.cat(
            [d.up.double() * (w * d.scale) for d, w in zip(deltas, weights, strict=True)], dim=1
        ),
        torch.cat([delta.down.double() for delta in deltas], dim=0),
    )


def exact_deltas(joint: Joint, method: Method, kind: Arithmetic) -> list[Factored]:
    """Return what the method makes of a module's deltas, exactly, for each expert."""
    weights = [term.weight for term in joint.terms]
    return [
        _exact(joint, index, deltas, weights, method)[1]
        for index, deltas in enumerate(load_terms(joint, kind))
    ]


def joint_spectra(joint: Joint, method: Method, kind: Arithmetic) -> list[list[float]]:
    """Return the singular values of a module's delta, for each expert."""
    return [delta.singular_values.tolist() for delta in exact_deltas(joint, method, kind)]


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
    generator = generator_for(method.seed, joint.name, expert)
    return None, combine(method.name, deltas, weights, method.settings, generator)


def compute(
    job: ModuleJob, method: Method, kind: Arithmetic
) -> tuple[dict[Slot, Tensor], ModuleReport]:
    """Compute the tensors of a module in the dtype they are written in.

    Raises:
        AdapterError: A factor is not finite.
        MergeError: The dtype cannot hold the result.
    """
    joint, output = job.joint, job.output
    weights = [term.weight for term in joint.terms]
    dtype = torch_dtype(output.dtype)
    ups, downs, reports = [], [], []
    for expert, deltas in enumerate(load_terms(joint, kind)):
        factors, delta = _exact(joint, expert, deltas, weights, method)
        gross = math.fsum(abs(w) * norm(term) for w, term in zip(weights, deltas, strict=True))
        written, error = _written(job, factors, delta, dtype)
        ups.append(written.up)
        downs.append(written.down)
        distance = None
        if method.name != "linear":
            distance = factor(stacked(deltas, weights)).squared_distance(written)
        reports.append(_report(job, delta, error, gross, distance))
    tensors = _assembled(job, ups, downs)
    if Slot.UP_BIAS in job.specs:
        tensors[Slot.UP_BIAS] = _bias(joint, kind).to(dtype)
    if Slot.ALPHA in job.specs:
        tensors[Slot.ALPHA] = torch.tensor(output.alpha, dtype=torch.float32)
    for slot, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise MergeError(
                joint.name,
                f"{slot.value!r} overflows in {output.dtype}",
                hint="write it with --dtype float32 (or bfloat16)"
                if output.dtype == "F16"
                else None,
            )
    return tensors, _joined(job, reports)


def measure(job: ModuleJob, kind: Arithmetic) -> ModuleReport:
    """Report on a module whose factors are copied: nothing is lost."""
    reports = []
    for deltas in load_terms(job.joint, kind):
        delta = factor(stacked(deltas, [1.0]))
        values = delta.singular_values.tolist()
        reports.append(
            ModuleReport(
                job.joint.name,
                job.output.rank,
                job.output.rank,
                delta.squared_norm,
                0.0,
                tuple(values),
                (),
            )
        )
    return _joined(job, reports)


def _written(
    job: ModuleJob, factors: LowRank | None, delta: Factored, dtype: torch.dtype
) -> tuple[LowRank, float]:
    """Return the factors that are written, not yet in their shapes, and their squared error."""
    rank = job.output.rank
    if factors is None or rank < job.joint.full_rank:
        best = _rounded(delta.truncated(rank), dtype)
        return best, delta.squared_distance(best)
    exact = _padded(_narrowed(factors), rank)
    written = _rounded(exact, dtype)
    if torch.equal(written.up.double(), exact.up) and torch.equal(
        written.down.double(), exact.down
    ):
        return written, 0.0
    error = delta.squared_distance(written)
    if error > (2 * UNITS[job.output.dtype]) ** 2 * delta.squared_norm:
        # The terms nearly cancel, and the rounding of each is large against their sum; the
        # factors of the sum itself round better.
        other = _rounded(delta.truncated(rank), dtype)
        if (better := delta.squared_distance(other)) < error:
            return other, better
    return written, error


def _rounded(factors: LowRank, dtype: torch.dtype) -> LowRank:
    return LowRank(factors.up.to(dtype), factors.down.to(dtype))


def _narrowed(factors: LowRank) -> LowRank:
    """Return the same delta with no more ranks than its smaller side: dense, and an identity."""
    rows, columns = factors.shape
    if factors.rank <= min(rows, columns):
        return factors
    dense = factors.dense()
    side = torch.eye(min(rows, columns), dtype=dense.dtype, device=dense.device)
    return LowRank(dense, side) if columns <= rows else LowRank(side, dense)


def _padded(factors: LowRank, rank: int) -> LowRank:
    missing = rank - factors.rank
    if missing <= 0:
        return factors
    pad = torch.nn.functional.pad
    return LowRank(pad(factors.up, (0, missing)), pad(factors.down, (0, 0, 0, missing)))


def _report(
    job: ModuleJob, delta: Factored, error: float, gross: float, distance: float | None
) -> ModuleReport:
    values = delta.singular_values.tolist()
    squared_norm = delta.squared_norm
    cancelled = gross > 0 and math.sqrt(squared_norm) <= CANCELLED * gross
    if cancelled:
        squared_norm = 0.0
    return ModuleReport(
        job.joint.name,
        job.output.rank,
        job.joint.full_rank,
        squared_norm,
        error,
        tuple(values[: job.output.rank]),
        tuple(values[job.output.rank :]),
        cancelled,
        distance,
    )


def _joined(job: ModuleJob, reports: Sequence[ModuleReport]) -> ModuleReport:
    """Return one report for all experts of a module."""
    if len(reports) == 1:
        return reports[0]
    distances = [r.squared_distance for r in reports if r.squared_distance is not None]
    return ModuleReport(
        job.joint.name,
        job.output.rank,
        reports[0].from_rank,
        math.fsum(r.squared_norm for r in reports),
        math.fsum(r.squared_error for r in reports),
        tuple(sorted((v for r in reports for v in r.singular_values), reverse=True)),
        tuple(sorted((v for r in reports for v in r.discarded), reverse=True)),
        all(r.cancelled for r in reports),
        math.fsum(distances) if distances else None,
    )


def _assembled(
    job: ModuleJob, ups: Sequence[Tensor], downs: Sequence[Tensor]
) -> dict[Slot, Tensor]:
    """Return A and B in the shapes that are stored; experts stacked as PEFT stacks them."""
    down = torch.cat(list(downs), dim=0) if len(downs) > 1 else downs[0]
    up = torch.stack(list(ups), dim=2).flatten(1) if len(ups) > 1 else ups[0]
    tensors: dict[Slot, Tensor] = {}
    for slot, spec in job.specs.items():
        if slot in (Slot.DOWN, Slot.EMBEDDING_DOWN):
            tensors[slot] = down.reshape(spec.shape)
        elif slot in (Slot.UP, Slot.EMBEDDING_UP):
            tensors[slot] = up.reshape(spec.shape)
    return tensors


def transposed(job: ModuleJob, of: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
    """Return the factors of a head that is tied to the embedding whose factors are ``of``."""
    found = {
        Slot.DOWN: of[Slot.EMBEDDING_UP].mT.contiguous(),
        Slot.UP: of[Slot.EMBEDDING_DOWN].mT.contiguous(),
    }
    if Slot.ALPHA in job.specs:
        found[Slot.ALPHA] = torch.tensor(job.output.alpha, dtype=torch.float32)
    return found


def _bias(joint: Joint, kind: Arithmetic) -> Tensor:
    """Return ``Σ weight · scale · bias``, ``(out,)`` float64."""
    total = torch.zeros(joint.output.out, dtype=torch.float64, device=kind.device)
    for term in joint.terms:
        stored = term.site.slots.get(Slot.UP_BIAS)
        if stored is not None:
            total += read_tensor(stored, kind).double() * (term.weight * term.site.scaling.factor)
    return total
