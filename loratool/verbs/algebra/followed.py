"""A new strength of modules without A and B: by an alpha, or by tensors that the delta follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loratool.adapter.model import Adapter, Site
from loratool.adapter.part import Part
from loratool.adapter.problems import check_sound, plain_hint
from loratool.adapter.slots import Slot
from loratool.errors import UnsupportedError
from loratool.values.expr import Constant, Expr, Stored
from loratool.write.stored import part_of

__all__ = ["Followed", "followed_of"]


@dataclass(frozen=True, slots=True)
class Followed:
    """What becomes of one module: its delta, and what is added to its bias, times ``ratio``."""

    site: Site
    ratio: float

    @property
    def scales(self) -> tuple[float, float]:
        """Old and new scale."""
        old = self.site.scaling.factor
        return old, old * self.ratio

    @property
    def _factors(self) -> tuple[Slot, ...]:
        """Roles of the tensors that are multiplied, where no alpha is."""
        slots = self.site.variant.followed(self.site.slots)
        return (*slots, Slot.BIAS) if Slot.BIAS in self.site.slots else slots

    @property
    def _has_alpha(self) -> bool:
        scaling = self.site.scaling
        return Slot.ALPHA in self.site.slots and scaling.alpha is not None

    def in_place(self) -> Iterator[tuple[str, Expr]]:
        """Yield what becomes of the tensors that change, by their names."""
        for slot in self._factors:
            stored = self.site.slots[slot]
            if slot is Slot.BIAS or not self._has_alpha:
                yield stored.spec.name, Stored(stored).scaled(self.ratio)
        if self._has_alpha:
            stored = self.site.slots[Slot.ALPHA]
            alpha = (self.site.scaling.alpha or 0.0) * self.ratio
            yield stored.spec.name, Constant(alpha, stored.spec.shape, "F32")

    def part(self, adapter: Adapter) -> Part:
        """Return the module with its new strength, for schemes with alphas."""
        part = part_of(self.site, adapter)
        values = dict(part.values)
        if not self.site.variant.is_scaled:
            values |= {slot: values[slot].scaled(self.ratio) for slot in self._factors}
            return replace(part, values=values)
        if Slot.BIAS in values:
            values[Slot.BIAS] = values[Slot.BIAS].scaled(self.ratio)
        alpha = part.alpha * self.ratio if part.alpha is not None else None
        return replace(part, values=values, scale=part.scale * self.ratio, alpha=alpha)


def followed_of(
    adapter: Adapter, ratios: Mapping[str, float], sites: Sequence[Site]
) -> list[Followed]:
    """Return what becomes of modules that are not made of A and B alone.

    Args:
        adapter: The adapter.
        ratios: What each is multiplied by, by its label.
        sites: The modules.

    Raises:
        AdapterError: One is broken.
        UnsupportedError: No tensor of one is such that its delta follows it.
    """
    for site in sites:
        where = f"{adapter.path}: {site.label}"
        check_sound(site, adapter)
        is_followed = site.variant.followed(site.slots) or site.slots.keys() <= {Slot.BIAS}
        if not is_followed or Slot.MAGNITUDE in site.slots:
            raise UnsupportedError(
                where,
                f"is {site.variant.words}: no scale multiplies what it changes",
                hint=plain_hint(site, adapter),
            )
    return [Followed(site, ratios[site.label]) for site in sites]
