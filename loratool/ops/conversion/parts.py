"""The modules of an adapter between two schemes: a path, values by role, a scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loratool.adapter.model import Adapter, Kind, Site
from loratool.adapter.scheme import ScaleRule
from loratool.adapter.shapes import width_of
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError, UnsupportedError
from loratool.ops.conversion.values import Arranged, Computed, Stored, Value, widest
from loratool.ops.conversion.views import reshaped, rows
from loratool.ops.merging.mergeable import site_problems
from loratool.schemes import scheme_named

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Part", "part_of"]

BETWEEN = frozenset((Slot.SINGULAR, Slot.DIAGONAL))
PAIRS = ((Slot.DOWN, Slot.UP), (Slot.EMBEDDING_DOWN, Slot.EMBEDDING_UP))


@dataclass(frozen=True, slots=True)
class Part:
    """One adapted module, in no scheme in particular.

    Attributes:
        module: Its dotted path, with its component where it is part of a pipeline.
        kind: Linear, conv or embedding.
        variant: ``lora``, ``dora``, or another that no A and B express.
        values: Its tensors by role; A is ``(r, in, *kernel)`` and B ``(out, r, *ones)``.
        rank: What alpha is divided by.
        scale: What multiplies the delta.
        alpha: The recorded numerator, where the scale is exactly ``alpha / rank``.
        site: What it comes from.
        notes: How it differs from what was stored.
    """

    module: str
    kind: Kind
    variant: str
    values: Mapping[Slot, Value]
    rank: int
    scale: float
    alpha: float | None
    site: Site
    notes: tuple[str, ...] = field(default=())

    @property
    def slots(self) -> tuple[Slot, Slot]:
        """The roles of A and B."""
        is_embedding = Slot.EMBEDDING_DOWN in self.values
        return PAIRS[1] if is_embedding else PAIRS[0]

    @property
    def down(self) -> Value:
        """A."""
        return self.values[self.slots[0]]

    @property
    def up(self) -> Value:
        """B."""
        return self.values[self.slots[1]]

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
        down: Value,
        up: Value,
        *,
        note: str = "",
        scale: float | None = None,
        alpha: float | None = None,
    ) -> Part:
        """Return the same module with other factors of the same kind."""
        slots = self.slots
        others: dict[Slot, Value] = {
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


def part_of(site: Site, adapter: Adapter, width: int | None = None) -> Part:
    """Return a site of ``adapter`` as a part.

    Args:
        site: The site.
        adapter: Its adapter.
        width: Inputs of the base's layer, where the base is at hand.

    Raises:
        AdapterError: It is broken.
        UnsupportedError: What its delta is only the base can tell.
    """
    for code, problem in site_problems(site, adapter):
        if code == "LT004" and "F8" in problem:
            continue  # 8-bit floats can be moved like any others
        raise AdapterError(f"{adapter.path}: {site.label}", f"{problem} ({code})")
    values: dict[Slot, Value] = {
        slot: Stored(tensor)
        for slot, tensor in site.slots.items()
        if slot is not Slot.ALPHA and slot not in BETWEEN
    }
    if Slot.MAGNITUDE in values:
        values[Slot.MAGNITUDE] = _magnitude(values[Slot.MAGNITUDE], adapter.scheme)
    scaling = site.scaling
    is_simple = not scaling.rank_stabilised and not scaling.epsilon and scaling.rank == site.rank
    part = Part(
        module=site.module,
        kind=site.kind,
        variant=site.variant,
        values=values,
        rank=site.rank,
        scale=scaling.factor,
        alpha=scaling.alpha if is_simple else None,
        site=site,
    )
    if site.variant == "stacked":
        return _unstacked(part)
    if site.variant in ("adalora", "bdlora"):
        return _expanded(part, width_of(site, adapter))
    if site.variant == "qalora" and width is not None:
        return _expanded(part, width)
    if site.variant in ("qalora", "kasa"):
        why = "A may see groups of inputs" if site.variant == "qalora" else "it truncates the base"
        raise UnsupportedError(
            f"{adapter.path}: {site.label}",
            f"is a {site.variant}: {why}, and only the base tells what its delta is",
            hint="give --base"
            if site.variant == "qalora"
            else "merge it into its base, and extract the difference of the two",
        )
    return part


def _magnitude(value: Value, scheme: str) -> Value:
    """Return magnitudes of the outputs as ``(out,)``, and those of the inputs as they are.

    LyCORIS stores ``(out, 1, …)`` or ``(1, in, …)``, PEFT ``(out,)`` or ``(1, out, 1, …)``.
    """
    size = max(value.shape, default=1)
    is_first = len(value.shape) < 2 or value.shape[0] == size
    if is_first or scheme_named(scheme).scale is not ScaleRule.ALPHA:
        return reshaped(value, (size,))
    return value


def _unstacked(part: Part) -> Part:
    """Return stacked factors of a merged projection as one A and one B.

    loralib's ``MergedLinear`` multiplies each part of A with its own part of B; B beside zeros
    for the parts that are not enabled is the same.
    """
    enabled, up = part.site.enabled, part.up
    rank = up.shape[1]
    height = up.shape[0] // sum(enabled)
    pieces, done = [], 0
    for place, is_enabled in enumerate(enabled):
        if is_enabled:
            piece = rows(up, done * height, (done + 1) * height)
            pieces.append((piece, place * height, done * rank))
            done += 1
    whole = Arranged(tuple(pieces), (len(enabled) * height, part.down.shape[0]), up.dtype)
    made = part.factored(part.down, whole, note="stacked factors laid out side by side")
    return replace(made, variant="lora")


def _expanded(part: Part, width: int) -> Part:
    """Return the A and B that a variant with compact or divided factors stands for."""
    site = part.site
    tensors = tuple(site.slots.values())
    dtype = widest([part.down.dtype, part.up.dtype])

    def factor(index: int) -> Callable[..., Tensor]:
        def read(*_: Tensor) -> Tensor:
            import torch

            from loratool.ops.factors import read_factors
            from loratool.ops.tensors import Arithmetic

            kind = Arithmetic(torch.float64, torch.device("cpu"))
            return read_factors(site, kind, width)[index]

        return read

    rank = part.down.shape[0]
    down = Computed("A", tensors, factor(0), (rank, width), dtype)
    up = Computed("B", tensors, factor(1), (part.up.shape[0], rank), dtype)
    made = part.factored(down, up, note=f"{site.variant} written out as plain factors")
    return replace(made, variant="lora")
