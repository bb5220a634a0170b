"""What a merge did, or would do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from loratool.display.document import Document, Lines
from loratool.display.figures import counted, human_bytes
from loratool.display.shown import Shown
from loratool.errors import FileFormatError, spoken
from loratool.plan.model import ModelPlan
from loratool.plan.outcome import Outcome
from loratool.plan.traffic import Traffic

__all__ = ["MergeReport"]

RETENTION_WARNING: Final = 0.9
KEPT: Final = ("files", "sidecars", "left_behind", "peak_memory")


@dataclass(frozen=True)
class MergeReport(Shown):
    """What a merge did, or would do.

    Attributes:
        plan: What was decided; ``None`` where parts that others have made were put together.
        planned: The same for scripts.
        tensors: Tensors in the output.
        merged: Tensors of the base that changed.
        copied: Tensors that did not.
        added: Tensors that the base did not have.
        unused: Adapter keys left out on request.
        bytes_written: Bytes of the weights files, written or to be written.
        retention: ``⟨W' - W, Δ⟩ / ‖Δ‖²``, the share of the update that survived rounding to
            the output dtype; ``None`` where nothing was added to anything.
        output: Where it is, or would be.
        is_written: Whether it was written.
        was_there: Whether somebody had written it before.
        traffic: What stores would be asked for, where it is not and they would be.
        notes: What a user should know, one sentence each.
    """

    plan: ModelPlan | None
    planned: Mapping[str, Any]
    tensors: int
    merged: int
    copied: int
    added: int
    unused: tuple[str, ...]
    bytes_written: int
    retention: float | None
    output: Path
    is_written: bool = True
    was_there: bool = False
    traffic: Traffic | None = None
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, plan: ModelPlan, output: Path) -> MergeReport:
        """Return the report of a merge that is planned, and nothing more."""
        return cls.told(plan.as_json(), output, plan)

    @classmethod
    def told(
        cls, planned: Mapping[str, Any], output: Path, plan: ModelPlan | None = None
    ) -> MergeReport:
        """Return the report of a merge of which this is known.

        Raises:
            FileFormatError: It is no plan of a merge.
        """
        try:
            return cls(
                plan=plan,
                planned=planned,
                tensors=planned["tensors"],
                merged=planned["merged"],
                copied=planned["copied"],
                added=planned["added"],
                unused=tuple(planned["unused"]),
                bytes_written=planned["bytes_to_write"],
                retention=None,
                output=output,
                is_written=False,
                notes=tuple(planned["notes"]),
            )
        except (KeyError, TypeError):
            raise FileFormatError(output, "is not planned as a merge") from None

    def written(
        self, outcome: Outcome, *, quantized: str = "", notes: Iterable[str] = ()
    ) -> MergeReport:
        """Return the report of the same merge once it is written.

        Args:
            outcome: What was found.
            quantized: What became of quantised weights.
            notes: What else a user should know.
        """
        retention = outcome.weights.retention
        told = [*self.notes, *notes]
        if retention is not None and retention < RETENTION_WARNING:
            wider = "write a wider one with --dtype float32"
            if quantized == "keep":
                wider = "leave out --quantized keep to write plain numbers"
            told.append(
                f"only {retention:.1%} of the update survived rounding to the output's dtype; "
                f"{wider}"
            )
        return replace(self, is_written=True, retention=retention, notes=tuple(told))

    @property
    def hub(self) -> Mapping[str, Any] | None:
        """Models and commits of what came from the hub; ``None`` where nothing did."""
        return self.planned.get("hub")

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        if not self.is_written:
            told: dict[str, Any] = {}
            if self.traffic is not None:
                told["transfer"] = self.traffic.as_json()
            output = spoken(str(self.output))
            told["notes"] = list(self.notes)
            return {**self.planned, **told, "output": output, "retention": None}
        return {
            "schema": 1,
            "dry_run": False,
            "output": spoken(str(self.output)),
            "tensors": self.tensors,
            "merged": self.merged,
            "copied": self.copied,
            "added": self.added,
            "unused": list(self.unused),
            "bytes_written": self.bytes_written,
            "retention": self.retention,
            **{name: self.planned[name] for name in KEPT},
            "notes": list(self.notes),
            **({"hub": self.hub} if self.hub else {}),
        }

    def document(self) -> Document:
        """Return what people see of it: one sentence, or the plan."""
        if not self.is_written and self.plan is not None:
            blocks = self.plan.document().blocks
            if self.traffic is not None:
                blocks = (*blocks, Lines((self.traffic.words,)))
            return Document(blocks, self.notes)
        if self.was_there:
            words = f"{self.output}: finished before, of the same inputs and with the same options"
            return Document((Lines((words,)),))
        added = f", {self.added} added" if self.added else ""
        words = (
            f"{self.output}: {counted(self.merged, 'tensor')} merged, {self.copied} copied{added}, "
            f"{human_bytes(self.bytes_written)}"
        )
        if self.retention is not None:
            words += f"; {min(self.retention, 1):.2%} of the update survived rounding"
        return Document((Lines((words,)),), self.notes)
