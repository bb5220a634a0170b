"""The plain LoRA delta, ``scale · up @ down``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loratool.math.namespace import Array, array_namespace

__all__ = ["LowRank", "is_power_of_two", "stack"]


@dataclass(frozen=True, slots=True)
class LowRank:
    """A matrix of shape ``(m, n)`` as ``scale · up @ down``.

    Attributes:
        up: ``(m, r)``.
        down: ``(r, n)``.
        scale: A number.
    """

    up: Array
    down: Array
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        """Columns of ``up``: the rank of the factors, an upper bound of the matrix's."""
        rank: int = self.up.shape[1]
        return rank

    @property
    def mT(self) -> LowRank:  # noqa: N802 - the name in the standard
        """The transpose, ``(n, m)``."""
        return LowRank(self.down.mT, self.up.mT, self.scale)

    def dense(self) -> Array:
        """The matrix itself, ``(m, n)``: ``(up @ down) · scale`` in that order."""
        product = self.up @ self.down
        product *= self.scale
        return product

    def add_to(self, block: Array, start: int) -> None:
        """Add rows ``start`` to ``start + len(block)`` to ``block``, ``(rows, n)``, in place.

        A scale that is a power of two commutes with every rounding and costs nothing; any
        other is applied to the product, as PEFT does, so that the bits agree.

        Only for PyTorch; it goes once blocks of weights are changed by the kernel that merges.
        """
        up = self.up[start : start + block.shape[0]]
        if is_power_of_two(self.scale):
            block.addmm_(up.mul(self.scale), self.down)
        else:
            block.add_(up.mm(self.down).mul_(self.scale))


def stack(terms: list[LowRank]) -> LowRank:
    """Return the exact sum of ``terms`` as one pair of factors; all must share a shape.

    One term keeps its scale; of several, each ``up`` carries its own.
    """
    if len(terms) == 1:
        return terms[0]
    xp = array_namespace(*(factor for term in terms for factor in (term.up, term.down)))
    return LowRank(
        xp.concat([term.up * term.scale for term in terms], axis=1),
        xp.concat([term.down for term in terms], axis=0),
    )


def is_power_of_two(value: float) -> bool:
    """Whether multiplying by ``value`` only moves the exponent (zero counts)."""
    return value == 0 or abs(math.frexp(value)[0]) == 0.5
