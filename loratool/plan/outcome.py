"""What is found while a plan is carried out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class _Measured(Protocol):
    """What something that was computed as a whole says of its error."""

    @property
    def squared_norm(self) -> float: ...
    @property
    def squared_error(self) -> float: ...


@dataclass
class Outcome:
    """What was found while a plan was carried out.

    Attributes:
        errors: Module to the squared norm of its delta and of the error of what was written.
        shifted: Modules of which part of the scale went into A, a power of two.
        nonfinite: Modules whose delta holds NaN or infinity, and has no error that means anything.
        reports: What the things that were computed as a whole say about themselves, by name.
        weights: What rounding left of the updates of a model's weights.
        digests: SHA-256 of the inputs that the history tells of.
    """

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    shifted: list[str] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)
    reports: dict[str, Any] = field(default_factory=dict)
    weights: RunResult = field(default_factory=RunResult)
    digests: dict[Path, str] = field(default_factory=dict)

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

    @property
    def total_error(self) -> float:
        """The same, with what was computed as a whole and says what that lost."""
        reports = [each for each in self.reports.values() if isinstance(each, _Measured)]
        pairs = [*self.errors.values(), *((r.squared_norm, r.squared_error) for r in reports)]
        norm = math.fsum(pair[0] for pair in pairs)
        return math.sqrt(math.fsum(pair[1] for pair in pairs) / norm) if norm else 0.0
