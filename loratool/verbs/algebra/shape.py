"""What a module's delta is but for its rank: enough to choose one, and to write it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loratool.adapter.model import Kind
from loratool.adapter.part import Part
from loratool.adapter.slots import Slot
from loratool.names.experts import is_fusible_expert
from loratool.values.expr import Expr, Result, Together
from loratool.variants import variant_named

__all__ = ["DeltaShape"]


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """A module's delta but for its rank.

    Attributes:
        module: Its dotted path.
        kind: Linear, conv or embedding.
        dtype: Of the factors that are written, as a header calls it.
        out: Rows of B.
        into: Shape of A without its rank: ``(in,)``, or ``(in, *kernel)``.
        nesting: How many ``base_layer`` steps its keys have in PEFT's files.
        experts: How many deltas the factors stack.
        parameter: Full path of the raw parameter that it adapts, if it adapts one.
        has_bias: Whether a bias is stored beside B.
        has_magnitude: Whether it is a DoRA, with the length of each row beside B.
        is_target: Whether PEFT's configuration has to name it among the targets.
    """

    module: str
    kind: Kind
    dtype: str
    out: int
    into: tuple[int, ...]
    nesting: int = 0
    experts: int = 1
    parameter: str | None = None
    has_bias: bool = False
    has_magnitude: bool = False
    is_target: bool = True

    @property
    def pattern_path(self) -> str:
        """What the patterns of PEFT's configuration are matched against."""
        if self.parameter is not None:
            return self.parameter
        return self.module.rpartition(".")[0] if self.nesting else self.module

    @property
    def needs_default(self) -> bool:
        """Whether its rank has to be the configuration's own: PEFT has no patterns for it."""
        return self.parameter is not None or is_fusible_expert(self.module)

    @property
    def columns(self) -> int:
        """Columns of the delta, kernels flattened."""
        return math.prod(self.into)

    @property
    def smallest_side(self) -> int:
        """The rank that no matrix of this shape exceeds."""
        return min(self.out, self.columns)

    def part(self, of: Together, rank: int) -> Part:
        """Return the module whose A, B and bias or magnitude are the tensors of ``of``, in order.

        A is ``(experts · rank, in)`` and B ``(out, rank · experts)``; the scale is 1.
        """
        is_embedding = self.kind is Kind.EMBEDDING
        low, high = (
            (Slot.EMBEDDING_DOWN, Slot.EMBEDDING_UP) if is_embedding else (Slot.DOWN, Slot.UP)
        )
        height = rank * self.experts
        ones = (1,) * (len(self.into) - 1)
        values: dict[Slot, Expr] = {
            low: Result(of, 0, (height, *self.into), self.dtype),
            high: Result(of, 1, (self.out, height, *ones), self.dtype),
        }
        if self.has_bias:
            values[Slot.UP_BIAS] = Result(of, 2, (self.out,), self.dtype)
        if self.has_magnitude:
            values[Slot.MAGNITUDE] = Result(
                of, 2, (self.out,), "F64" if self.dtype == "F64" else "F32"
            )
        return Part(
            module=self.module,
            kind=self.kind,
            variant=variant_named("dora" if self.has_magnitude else "lora"),
            values=values,
            rank=rank,
            scale=1.0,
            alpha=float(rank),
            nesting=self.nesting,
            experts=self.experts,
            parameter=self.parameter,
            is_target=self.is_target,
        )
