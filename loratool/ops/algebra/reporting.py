"""What a plan would lose, told from spectra before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from loratool.ops.algebra.computing import Method, ModuleReport, compute
from loratool.ops.algebra.joining import Joint
from loratool.ops.algebra.planning import Draft, ModuleJob
from loratool.ops.algebra.ranks import full_ranks
from loratool.ops.tensors import Arithmetic

__all__ = ["expected_report", "meets_error"]

ROUNDED: frozenset[str] = frozenset(("F16", "BF16"))


def expected_report(job: ModuleJob, spectra: Sequence[Sequence[float]]) -> ModuleReport:
    """Return the report of a module from its singular values, without rounding."""
    kept = [value for values in spectra for value in values[: job.output.rank]]
    tail = [value for values in spectra for value in values[job.output.rank :]]
    return ModuleReport(
        job.joint.name,
        job.output.rank,
        job.joint.full_rank,
        math.fsum(value * value for value in (*kept, *tail)),
        math.fsum(value * value for value in tail),
        tuple(sorted(kept, reverse=True)),
        tuple(sorted(tail, reverse=True)),
    )


def meets_error(
    draft: Draft,
    method: Method,
    kind: Arithmetic,
    limit: float,
    spectra: Mapping[str, Sequence[Sequence[float]]],
) -> Callable[[Joint, int], bool]:
    """Return whether a rank keeps the error below ``limit`` with the rounding of its dtype.

    The spectrum alone answers it where rounding is too small to matter; otherwise the factors
    are computed and rounded as they would be written.
    """

    def is_met(joint: Joint, rank: int) -> bool:
        report = None
        for values in (spectra[joint.name],):
            squares = [[value * value for value in one] for one in values]
            total = math.fsum(map(math.fsum, squares))
            tail = math.fsum(math.fsum(one[rank:]) for one in squares)
            if not total:
                return True
            if joint.output.dtype not in ROUNDED and tail < 0.999 * limit**2 * total:
                return True
        ranks = {**full_ranks(draft.joints), joint.output.pattern_path: rank}
        job = next(job for job in draft.plan(ranks).jobs if job.joint.name == joint.name)
        if job.route == "copy":
            return True
        report = compute(job, method, kind)[1]
        return report.relative_error <= limit

    return is_met
