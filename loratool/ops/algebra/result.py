"""What the verbs that write an adapter return."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratool.ops.algebra.computing import ModuleReport
    from loratool.ops.algebra.plan import AdapterPlan
    from loratool.ops.conversion.plan import ConversionPlan

__all__ = ["AdapterReport"]


@dataclass(frozen=True)
class AdapterReport:
    """An adapter that was written, or would be.

    Attributes:
        modules: What was written for each module, against what it should be; empty for a dry
            run that computed nothing.
        plan: What was decided.
        is_written: Whether it was written.
        notes: What a user should know, one sentence each.
        final: How the result is written in a scheme that the verb does not write itself.
    """

    modules: tuple[ModuleReport, ...]
    plan: AdapterPlan
    is_written: bool
    notes: tuple[str, ...]
    final: ConversionPlan | None = None

    @property
    def shown(self) -> AdapterPlan | ConversionPlan:
        """The plan of the files that there are in the end."""
        return self.final if self.final is not None else self.plan

    @property
    def relative_error(self) -> float:
        """``‖written - Δ‖ / ‖Δ‖`` over all modules; 0 where every Δ is zero."""
        return self._relative(math.fsum(m.squared_error for m in self.modules))

    @property
    def distance_from_sum(self) -> float | None:
        """``‖written - Σ weight · Δ‖ / ‖Δ‖``, for methods other than the sum."""
        found = [m.squared_distance for m in self.modules if m.squared_distance is not None]
        return self._relative(math.fsum(found)) if found else None

    def _relative(self, squared: float) -> float:
        total = math.fsum(module.squared_norm for module in self.modules)
        return math.sqrt(squared / total) if total else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        plan = self.shown
        document: dict[str, Any] = {
            "schema": 1,
            "dry_run": not self.is_written,
            "relative_error": self.relative_error,
            "modules": [
                {
                    "module": module.module,
                    "rank": module.rank,
                    "from_rank": module.from_rank,
                    "relative_error": module.relative_error,
                    "frobenius_norm": math.sqrt(module.squared_norm),
                    "singular_values": list(module.singular_values),
                    "discarded_singular_values": list(module.discarded),
                }
                for module in self.modules
            ],
            "bytes_written" if self.is_written else "bytes_to_write": plan.nbytes,
            "tensors": len(plan.specs),
            "files": plan.described_files(),
            "peak_memory": plan.peak_memory,
            "sidecars": [sidecar.name for sidecar in plan.sidecars],
            "carried": [item.spec.name for item in plan.carried if item.constant is None],
            "dropped": [{"name": name, "why": why} for name, why in self.plan.dropped],
            "notes": list(self.notes),
        }
        if self.distance_from_sum is not None:
            document["distance_from_sum"] = self.distance_from_sum
        return document
