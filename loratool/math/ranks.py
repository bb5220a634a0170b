"""Which rank is enough for a matrix.

A matrix is described by its profile, the descending squares of its singular values: what each
further rank adds to ``‖Δ‖_F²``. Fused experts share one rank, so their profile is the sum of the
profiles of all of them.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Final

__all__ = ["RULES", "minimal_rank", "numerical_rank", "profile_of"]

NEGLIGIBLE: Final = 1e-26
"""Of the largest square: below it a singular value is the rounding of float64."""
SLACK: Final = 1e-12
"""Relative; a threshold that is met to this much is met."""
RULES: Final = ("energy", "max_error", "sv_ratio", "sv_fro", "sv_cumulative")


def profile_of(spectra: Sequence[Sequence[float]]) -> list[float]:
    """Return the profile of matrices that share one rank."""
    padded = itertools.zip_longest(*spectra, fillvalue=0.0)
    return [math.fsum(value * value for value in values) for values in padded]


def numerical_rank(profile: Sequence[float]) -> int:
    """Return how many singular values are more than the rounding of float64."""
    floor = profile[0] * NEGLIGIBLE if profile else 0.0
    return sum(1 for square in profile if square > floor)


def minimal_rank(profile: Sequence[float], rule: str, value: float, *, rest: float = 0.0) -> int:
    """Return the smallest rank that satisfies ``rule``, at least 1.

    Args:
        profile: Squares of the singular values, descending.
        rule: One of ``RULES``: ``energy``, the share of ``‖Δ‖_F²`` to keep; ``max_error``, the
            relative Frobenius error to allow; and the three of kohya's ``resize_lora``, each
            without its off-by-one: ``sv_ratio``, keep ``σ > σ₁ / value``; ``sv_fro``, the share
            of ``‖Δ‖_F`` to keep; ``sv_cumulative``, the share of ``Σσ`` to keep.
        value: What the rule is about.
        rest: What the matrix has of ``‖Δ‖_F²`` beside the profile, lost at any rank.
    """
    rank = numerical_rank(profile)
    squares = profile[:rank]
    if not squares:
        return 1
    match rule:
        case "sv_ratio":
            least = squares[0] / value**2
            return max(1, sum(1 for square in squares if square > least * (1 + SLACK)))
        case "sv_cumulative":
            return _smallest([math.sqrt(square) for square in squares], 1 - value)
        case "sv_fro":
            return _smallest(squares, 1 - value**2, rest)
        case "energy":
            return _smallest(squares, 1 - value, rest)
        case "max_error":
            return _smallest(squares, value**2, rest)
        case _:
            raise ValueError(rule)


def _smallest(terms: Sequence[float], allowed: float, rest: float = 0.0) -> int:
    """Return the fewest leading terms whose remainder is at most the share ``allowed``."""
    limit = (math.fsum(terms) + rest) * allowed * (1 + SLACK) - rest
    # Summed from the smallest on, so that small remainders keep their digits.
    tails = list(itertools.accumulate(reversed(terms)))
    return max(1, len(terms) - bisect.bisect_right(tails, limit))
