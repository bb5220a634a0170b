"""What a plan would lose, told from spectra before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from loratool.ops.algebra.computing import Method, ModuleReport, compute
from loratool.ops.algebra.joining import Joint
from loratool.ops.algebra.planning import Draft
from loratool.ops.algebra.ranks import full_ranks
from loratool.ops.tensors import Arithmetic

__all__ = ["expected_report", "meets_error"]

ROUNDED: Final = frozenset(("F16", "BF16"))
CLOSE: Final = 0.9995
"""An error this close to a limit may be pushed over it by the rounding of float32."""


def expected_report(joint: Joint, rank: int, spectra: Sequence[Sequence[float]]) -> ModuleReport:
    """Return the report of a module from its singular values, without rounding."""
    kept = [value for values in spectra for value in values[:rank]]
    tail = [value for values in spectra for value in values[rank:]]
    return ModuleReport(
        joint.name,
        rank,
        joint.full_rank,
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
        expected = expected_report(joint, rank, spectra[joint.name])
        is_rounded = joint.output.dtype in ROUNDED
        if not is_rounded and expected.relative_error < limit * CLOSE:
            return True
        ranks = {**full_ranks(draft.joints), joint.rank_group: rank}
        job = next(job for job in draft.plan(ranks).jobs if job.joint.name == joint.name)
        if job.route == "copy":
            return True
        return compute(job, method, kind)[1].relative_error <= limit

    return is_met
