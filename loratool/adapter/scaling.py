"""The number that multiplies ``B @ A``."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Scaling"]


@dataclass(frozen=True, slots=True)
class Scaling:
    """Alpha and rank.

    Attributes:
        alpha: The numerator, or ``None`` where nothing records it (the scale is then 1, as
            every loader of such files takes it).
        rank: The rank of the factors.
        rank_stabilised: Divide by ``sqrt(rank)`` instead of ``rank`` (rsLoRA, arXiv 2312.03732).
        epsilon: Added to the divisor; AdaLoRA's is 1e-5.
        multiplier: The factor itself, where that is what was recorded.
    """

    alpha: float | None
    rank: int
    rank_stabilised: bool = False
    epsilon: float = 0.0
    multiplier: float | None = None

    @property
    def factor(self) -> float:
        """``alpha / rank``, ``alpha / sqrt(rank)``, or 1."""
        if self.multiplier is not None:
            return self.multiplier
        if self.alpha is None or self.rank == 0:
            return 1.0
        divisor = math.sqrt(self.rank) if self.rank_stabilised else self.rank
        return self.alpha / (divisor + self.epsilon)
