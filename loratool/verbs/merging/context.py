"""One adapter's share of a merge: what happens to each tensor of the base."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from loratool.adapter.model import Adapter, Extra, Site
from loratool.files.spec import StoredTensor
from loratool.names.strengths import Strength
from loratool.plan.model import Blend, Edit, SetRows

__all__ = ["Changes", "Share"]


@dataclass
class Changes:
    """What happens to one tensor: the base's, or one that is added.

    Attributes:
        replacement: The adapter's tensor that takes its place, if any.
        base: The adapter's copy of the base's tensor, where it has another shape (a resized
            vocabulary): what the edits apply to.
        grown: The shape that it gets first, with zeros in what is new.
        edits: What is done to it, in order.
    """

    replacement: StoredTensor | None = None
    base: StoredTensor | None = None
    grown: tuple[int, ...] | None = None
    edits: list[Edit] = field(default_factory=list)

    def __bool__(self) -> bool:
        given = (self.replacement, self.base, self.grown)
        return bool(self.edits) or any(each is not None for each in given)

    @property
    def source(self) -> StoredTensor | None:
        """What the adapter puts in the place of the base's tensor, if anything."""
        return self.replacement or self.base

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape that the adapter gives it, if it gives it one."""
        return self.grown if self.source is None else self.source.spec.shape

    @property
    def copies(self) -> list[Blend]:
        """The copies of the base weight among the edits."""
        return [e for e in self.edits if isinstance(e, Blend) and e.only_if_different]

    @property
    def effects(self) -> list[Edit]:
        """The edits without copies of the base weight, which change nothing by themselves."""
        return [e for e in self.edits if not (isinstance(e, Blend) and e.only_if_different)]

    @property
    def is_rows_only(self) -> bool:
        """Whether it gives some rows new values and nothing else."""
        return self.replacement is None and all(isinstance(e, SetRows) for e in self.effects)


@dataclass
class Share:
    """One adapter's part in a merge.

    Attributes:
        adapter: The adapter.
        weight: What its delta is multiplied by.
        changes: By the name of the output tensor.
        notes: What a user should know.
        strength: What the deltas of single modules are multiplied by instead.
    """

    adapter: Adapter
    weight: float
    changes: dict[str, Changes] = field(default_factory=lambda: defaultdict(Changes))
    notes: list[str] = field(default_factory=list)
    strength: Strength | None = None

    @staticmethod
    def of(adapter: Adapter, strength: Strength) -> Share:
        """Return an adapter's part, nothing of which is planned yet."""
        return Share(adapter, strength.number, strength=strength)

    def at(self, what: Site | Extra) -> Share:
        """Return the same part with the weight of one module or tensor."""
        if self.strength is None:
            return self
        strength = self.strength
        weight = strength.of(what) if isinstance(what, Site) else strength.of_extra(what)
        return replace(self, weight=weight)

    def where(self, what: str) -> str:
        """Return ``what`` with the adapter's path before it, for error messages."""
        return f"{self.adapter.path}: {what}"
