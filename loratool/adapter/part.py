"""A module of an adapter that will be written: a path, expressions by role, a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loratool.adapter.model import Kind, Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Variant
from loratool.files.spec import StoredTensor
from loratool.values.expr import Expr

__all__ = ["Part"]

PAIRS = ((Slot.DOWN, Slot.UP), (Slot.EMBEDDING_DOWN, Slot.EMBEDDING_UP))


@dataclass(frozen=True, slots=True)
class Part:
    """One adapted module as it will be written, in no scheme in particular.

    Attributes:
        module: Its dotted path, with its component where it is part of a pipeline.
        kind: Linear, conv or embedding.
        variant: LoRA or DoRA where A and B express it, else what it is.
        values: Its tensors by role; A is ``(r, in, *kernel)`` and B ``(out, r, *ones)``.
        rank: What alpha is divided by.
        scale: What multiplies the delta.
        alpha: The recorded numerator, where the scale is exactly ``alpha / rank``.
        site: What it comes from, where that is one stored module.
        notes: How it differs from what was stored.
        nesting: How many ``base_layer`` steps its keys have in PEFT's files.
        experts: How many deltas its factors stack; 1 for an ordinary module.
        parameter: Full path of the raw parameter that it adapts, if it adapts one.
        is_target: Whether PEFT's configuration has to name it among the targets.
        stacked: The parts of a merged projection whose factors it stacks, with the rows of each:
            each takes as many rows of A as B has columns.
    """

    module: str
    kind: Kind
    variant: Variant
    values: Mapping[Slot, Expr]
    rank: int
    scale: float
    alpha: float | None
    site: Site | None = None
    notes: tuple[str, ...] = field(default=())
    nesting: int = 0
    experts: int = 1
    parameter: str | None = None
    is_target: bool = True
    stacked: tuple[tuple[str, int], ...] = ()

    @property
    def slots(self) -> tuple[Slot, Slot]:
        """The roles of A and B."""
        is_embedding = Slot.EMBEDDING_DOWN in self.values
        return PAIRS[1] if is_embedding else PAIRS[0]

    @property
    def down(self) -> Expr:
        """A."""
        return self.values[self.slots[0]]

    @property
    def up(self) -> Expr:
        """B."""
        return self.values[self.slots[1]]

    @property
    def label(self) -> str:
        """The module, with its nesting where that tells two apart."""
        return self.site.label if self.site is not None else self.module

    @property
    def pattern_path(self) -> str:
        """What the patterns of PEFT's configuration are matched against.

        The output projection inside an ``nn.MultiheadAttention`` goes by the attention's name.
        """
        if self.parameter is not None:
            return self.parameter
        return self.module.rpartition(".")[0] if self.nesting else self.module

    def stored(self, slot: Slot) -> StoredTensor | None:
        """Return the tensor that the module had in this role where it comes from, if any."""
        return self.site.slots.get(slot) if self.site is not None else None

    @property
    def is_plain(self) -> bool:
        """Whether A and B (with a magnitude, maybe) are all that its delta is made of."""
        return self.slots[0] in self.values and Slot.MID not in self.values

    @property
    def has_input_magnitudes(self) -> bool:
        """Whether its magnitudes belong to the inputs, ``(1, in, …)``, as LyCORIS also has it."""
        value = self.values.get(Slot.MAGNITUDE)
        return value is not None and len(value.shape) > 1

    @property
    def written_alpha(self) -> float:
        """The alpha that says its scale as ``alpha / rank``."""
        if self.alpha is not None and self.alpha / self.rank == self.scale:
            return self.alpha
        return self.scale * self.rank

    def factored(
        self,
        down: Expr,
        up: Expr,
        *,
        note: str = "",
        scale: float | None = None,
        alpha: float | None = None,
    ) -> Part:
        """Return the same module with other factors of the same kind."""
        slots = self.slots
        others: dict[Slot, Expr] = {
            s: v for s, v in self.values.items() if s not in slots and s is not Slot.MID
        }
        return replace(
            self,
            values={slots[0]: down, slots[1]: up, **others},
            rank=down.shape[0],
            scale=self.scale if scale is None else scale,
            alpha=alpha,
            notes=(*self.notes, note) if note else self.notes,
        )
