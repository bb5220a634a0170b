"""What an extraction found and wrote."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.display.shown import Shown
from loratool.errors import spoken
from loratool.plan.adapter import PYTHON_BYTES, AdapterPlan
from loratool.verbs.extraction.difference import ModuleResult

if TYPE_CHECKING:
    from loratool.display.document import Document

__all__ = ["ExtractReport", "LeftoverChange"]

COPIES: Final = {"lora": 1.3, "dora": 5.0}
"""What a module in work takes, in copies of its difference: a DoRA needs both weights beside it."""


@dataclass(frozen=True, slots=True)
class LeftoverChange:
    """A tensor that no factors stand for.

    Attributes:
        name: Its name.
        why: Why it is left over.
        squared_change: ``‖tuned - base‖²``; ``None`` where the two cannot be compared.
        is_carried: Whether the finetuned tensor is in the adapter whole.
    """

    name: str
    why: str
    squared_change: float | None
    is_carried: bool


@dataclass(frozen=True)
class ExtractReport(Shown):
    """What an extraction found and wrote.

    Attributes:
        modules: What was written for each module that changed.
        leftovers: What changed and is not in the factors.
        unchanged: How many selected modules did not change at all.
        plan: What was decided.
        shapes: ``(out, in)`` of the modules' deltas.
        is_written: Whether it was written.
        output: Where it is, or would be.
        device: What decomposed the differences.
        seconds: For a dry run: roughly how long it would take.
        at_a_time: How many modules the processor has in work.
        gpu_memory: For a dry run: bytes of a GPU's memory that it would take, roughly.
        notes: What a user should know.
    """

    modules: tuple[ModuleResult, ...]
    leftovers: tuple[LeftoverChange, ...]
    unchanged: int
    plan: AdapterPlan
    shapes: tuple[tuple[int, int], ...]
    is_written: bool
    output: Path
    device: str = "cpu"
    seconds: float | None = None
    gpu_memory: int | None = None
    at_a_time: int = 1
    notes: tuple[str, ...] = field(default=())

    @property
    def peak_memory(self) -> int:
        """Bytes of memory that it takes at most, roughly: differences in work, and all factors."""
        variants = {item.part.variant.name for item in self.plan.parts}
        copies = COPIES["dora" if "dora" in variants else "lora"]
        sizes = [rows * columns for rows, columns in self.shapes]
        factors = sum(4 * spec.elements for spec in self.plan.specs)
        return (
            PYTHON_BYTES
            + factors
            + round(
                sum(copies * 4 * size for size in sorted(sizes, reverse=True)[: self.at_a_time])
            )
        )

    @property
    def relative_error(self) -> float:
        """``‖written - Δ‖ / ‖Δ‖`` over the modules that changed."""
        total = math.fsum(module.squared_norm for module in self.modules)
        error = math.fsum(module.squared_error for module in self.modules)
        return math.sqrt(error / total) if total else 0.0

    @property
    def total_change(self) -> float:
        """``‖tuned - base‖²`` over everything that could be compared."""
        left = math.fsum(item.squared_change or 0.0 for item in self.leftovers)
        return left + math.fsum(module.squared_norm for module in self.modules)

    @property
    def captured(self) -> float:
        """The share of the total squared change that the adapter holds."""
        total = self.total_change
        lost = math.fsum(module.squared_error for module in self.modules) + math.fsum(
            item.squared_change or 0.0 for item in self.leftovers if not item.is_carried
        )
        return 1 - lost / total if total else 1.0

    def records(self) -> list[dict[str, Any]]:
        """Return flat rows, for a table or a DataFrame: one for each module."""
        return [
            {
                "module": module.module,
                "rank": module.rank,
                "relative_error": module.relative_error,
                "frobenius_norm": math.sqrt(module.squared_norm),
                "share_of_change": module.squared_norm / (self.total_change or 1.0),
                "noise_floor": module.floor,
            }
            for module in self.modules
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises, and more."""
        total = self.total_change or 1.0
        return {
            "schema": 1,
            "dry_run": not self.is_written,
            "output": spoken(str(self.output)),
            "device": self.device,
            "relative_error": self.relative_error,
            "captured": self.captured,
            "unchanged": self.unchanged,
            "modules": [
                {
                    "module": module.module,
                    "rank": module.rank,
                    "relative_error": module.relative_error,
                    "singular_values": list(module.singular_values),
                    "frobenius_norm": math.sqrt(module.squared_norm),
                    "share_of_change": module.squared_norm / total,
                    "noise_floor": module.floor,
                }
                | _plainly(module)
                for module in self.modules
            ],
            "leftovers": [
                {
                    "name": item.name,
                    "why": item.why,
                    "share_of_change": None
                    if item.squared_change is None
                    else item.squared_change / total,
                    "carried": item.is_carried,
                }
                for item in self.leftovers
            ],
            "bytes_written" if self.is_written else "bytes_to_write": self.plan.nbytes,
            "tensors": len(self.plan.specs),
            "dropped": [{"name": name, "why": why} for name, why in self.plan.dropped],
            "left_behind": [{"name": name, "why": why} for name, why in self.plan.left_behind],
            "files": self.plan.described_files(),
            "seconds_expected": self.seconds,
            "peak_memory": self.peak_memory,
            "gpu_memory": self.gpu_memory,
            "notes": list(self.notes),
        }

    def document(self) -> Document:
        """Return what people see of it."""
        from loratool.verbs.extraction.shown import extraction_document

        return extraction_document(self)


def _plainly(module: ModuleResult) -> dict[str, float]:
    """Return for a DoRA what the error of plain factors of the same rank is."""
    if module.squared_plain is None:
        return {}
    return {"plain_relative_error": math.sqrt(module.squared_plain / module.squared_norm)}
