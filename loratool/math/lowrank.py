"""The plain LoRA delta, ``scale · up @ down``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LowRank", "stack"]


@dataclass(frozen=True, slots=True)
class LowRank:
    """A matrix of shape ``(m, n)`` as ``scale · up @ down``.

    Attributes:
        up: ``(m, r)``.
        down: ``(r, n)``.
        scale: A number.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        """Columns of ``up``: the rank of the factors, an upper bound of the matrix's."""
        return self.up.shape[1]

    @property
    def mT(self) -> LowRank:  # noqa: N802 - torch's name for it
        """The transpose, ``(n, m)``."""
        return LowRank(self.down.mT, self.up.mT, self.scale)

    def dense(self) -> Tensor:
        """The matrix itself, ``(m, n)``: ``(up @ down) · scale`` in that order."""
        return (self.up @ self.down).mul_(self.scale)

    def add_to(self, block: Tensor, start: int) -> None:
        """Add rows ``start`` to ``start + len(block)`` to ``block``, ``(rows, n)``, in place.

        A scale that is a power of two commutes with every rounding and costs nothing; any
        other is applied to the product, as PEFT does, so that the bits agree.
        """
        up = self.up[start : start + block.shape[0]]
        if is_power_of_two(self.scale):
            block.addmm_(up.mul(self.scale), self.down)
        else:
            block.add_(torch.mm(up, self.down).mul_(self.scale))


def stack(terms: list[LowRank]) -> LowRank:
    """Return the exact sum of ``terms`` as one pair of factors; all must share a shape.

    One term keeps its scale; of several, each ``up`` carries its own.
    """
    if len(terms) == 1:
        return terms[0]
    return LowRank(
        torch.cat([term.up * term.scale for term in terms], dim=1),
        torch.cat([term.down for term in terms], dim=0),
    )


def is_power_of_two(value: float) -> bool:
    """Whether multiplying by ``value`` only moves the exponent (zero counts)."""
    return value == 0 or abs(math.frexp(value)[0]) == 0.5
