"""What is found while a plan is carried out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from loratool.plan.run import RunResult

__all__ = ["Approximated", "Outcome"]


@dataclass(frozen=True, slots=True)
class Approximated:
    """How well computed factors stand for what no factors equal.

    Attributes:
        squared_norm: ``‖Δ‖_F²``.
        squared_error: ``‖Δ - up @ down‖_F²``.
    """

    squared_norm: float
    squared_error: float


@dataclass
class Outcome:
    """What was found while a plan was carried out.

    Attributes:
        errors: Module to the squared norm of its delta and of the error of what was written.
        shifted: Modules of which part of the scale went into A, a power of two.
        nonfinite: Modules whose delta holds NaN or infinity, and has no error that means anything.
        reports: What the things that were computed as a whole say about themselves, by name.
        weights: What rounding left of the updates of a model's weights.
    """

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    shifted: list[str] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)
    reports: dict[str, Any] = field(default_factory=dict)
    weights: RunResult = field(default_factory=RunResult)

    def relative(self, module: str) -> float:
        """Return ``‖written - Δ‖ / ‖Δ‖`` of one module; 0 where it was moved."""
        norm, error = self.errors.get(module, (0.0, 0.0))
        return math.sqrt(error / norm) if norm else 0.0

    @property
    def relative_error(self) -> float:
        """The same over all modules that were computed."""
        norm = math.fsum(pair[0] for pair in self.errors.values())
        error = math.fsum(pair[1] for pair in self.errors.values())
        return math.sqrt(error / norm) if norm else 0.0
