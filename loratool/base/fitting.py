"""Which tensors of a model an adapter's site changes, and where in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from loratool.adapter.leaving import leave_out
from loratool.adapter.model import Adapter, Site
from loratool.adapter.slots import Slot
from loratool.base.experts import locate_in_fused, locate_parameter
from loratool.base.model import Model
from loratool.base.orientation import mismatch, region_for
from loratool.base.place import Place, bias_beside
from loratool.base.region import Region
from loratool.errors import MissingModuleError, UnsupportedError

__all__ = ["Fit", "as_spelled", "fit"]


@dataclass(frozen=True, slots=True)
class Fit:
    """One tensor that a site changes.

    Attributes:
        name: The tensor.
        region: Where in it the delta goes.
        site: The site.
        is_whole: Whether it is the weight of one module, the site's, and nothing else.
        first: Which of the site's outputs is the first that lies there.
        outputs: How many the site has, where the others lie elsewhere.
    """

    name: str
    region: Region
    site: Site
    is_whole: bool = True
    first: int = 0
    outputs: int | None = None

    @property
    def is_cut(self) -> bool:
        """Whether the site has further outputs, elsewhere."""
        return self.outputs is not None

    @property
    def bias(self) -> tuple[str, Region]:
        """The bias beside it, and where in that the same outputs lie."""
        region = self.region
        first = region.first_column if region.transposed else region.first_row
        count = region.columns if region.transposed else region.rows
        rows = Region(count, 1, first_row=first, exchanged=region.bias_exchanged)
        return bias_beside(self.name), rows


def fit(
    site: Site,
    adapter: Adapter,
    base: Model,
    assigned: Mapping[str, str],
    *,
    resized: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> list[Fit]:
    """Return the tensors of the base that ``site`` changes, and where in them.

    Args:
        site: A complete site.
        adapter: Its adapter.
        base: The base.
        assigned: Which parameter sites on raw parameters adapt, by their labels.
        resized: Shapes of tensors that the adapter replaces, by name.

    Raises:
        MissingModuleError: There is none; the nearest modules are told.
        BaseModelError: The shapes do not fit.
        UnsupportedError: What the adapter does there is no change of a weight.
    """
    if site.label in assigned:
        found = locate_parameter(site, assigned[site.label], adapter, base)
        return [Fit(name, region, site, is_whole=False) for name, region in found]
    in_fused = None
    own = site.spelled if _is_as_spelled(site.spelled, base) else site.module
    place = base.own_place(own, base.family or adapter.family)
    if place is None:
        in_fused = locate_in_fused(site, base)
    if in_fused is not None:
        return [Fit(*in_fused, site, is_whole=False)]
    place = place or base.find(site.module, family=adapter.family)
    if place is None:
        raise _missing(site, adapter, base)
    if base.config.reads_directly(place.module):
        raise UnsupportedError(
            f"{adapter.path}: {site.label}",
            "the head of this model reads the weight without calling the module, so in training "
            "the adapter had no effect there, which no merged weight can express",
            hint=leave_out(site) if len(adapter.sites) > 1 else None,
        )
    if not place.is_whole:
        return _cut(site, place)
    (piece,) = place.pieces
    shape = resized.get(piece.name) or piece.tensor.spec.shape
    is_flagged = bool(adapter.field("fan_in_fan_out"))
    return [
        Fit(piece.name, region_for(site, place.module, shape, base, is_flagged=is_flagged), site)
    ]


def _is_as_spelled(module: str, base: Model) -> bool:
    """Whether the base has a module of this very name, which is one of libraries by itself."""
    is_there = f"{module}.weight" in base.tensors
    return is_there and base.layout.unlike(module, base.config) is None


def as_spelled(adapter: Adapter, base: Model) -> Adapter:
    """Return an adapter that knows all modules which the base calls as its file does.

    Of a fused projection that llama.cpp has cut, an adapter of llama.cpp has the parts.
    """
    open_ = {m: p for m, p in adapter.unresolved.items() if f"{m}.weight" not in base.tensors}
    if len(open_) == len(adapter.unresolved):
        return adapter
    return replace(adapter, unresolved=open_, unknown=adapter.unknown if open_ else None)


def _cut(site: Site, place: Place) -> list[Fit]:
    """Return the parts of a site whose module the base has cut otherwise.

    Raises:
        BaseModelError: The shapes do not fit.
        UnsupportedError: The site cannot be cut.
    """
    fits = site.variant.places(site, place.shape)
    if (site.out_features, site.in_features) != place.shape if site.is_plain else not fits:
        raise mismatch(site, place.shape, (site.out_features, site.in_features))
    is_mixed = any(piece.region.exchanged for piece in place.pieces)
    if is_mixed and not _is_by_output(site):
        raise UnsupportedError(
            site.label,
            "is no delta by its outputs, which the base has in another order",
            hint="make it a plain LoRA: loratool convert ADAPTER --to peft --to-lora --base BASE "
            "--rank R -o OUT",
        )
    if len(place.pieces) == 1:
        (piece,) = place.pieces
        return [Fit(piece.name, piece.region, site, is_whole=False)]
    if site.nesting:
        raise _uncut(site, f"in {len(place.pieces)} parts, into which it cannot be cut")
    together = site.variant.outputs_together(site)
    for piece in place.pieces:
        if not together or piece.first % together or piece.outputs % together:
            raise _uncut(site, f"in {len(place.pieces)} parts, and it changes their rows together")
    return [
        Fit(piece.name, piece.region, site, piece.is_whole, piece.first, place.shape[0])
        for piece in place.pieces
    ]


def _is_by_output(site: Site) -> bool:
    """Whether a site adds a product of factors to the weight, and magnitudes of its outputs."""
    variant = site.variant
    magnitude = site.slots.get(Slot.MAGNITUDE)
    if magnitude is not None and (not site.is_plain or len(magnitude.spec.shape) != 1):
        return False
    has_delta = variant.has_factors and (site.is_plain or not variant.has_change)
    return has_delta and Slot.UP_BIAS not in site.slots


def _uncut(site: Site, words: str) -> UnsupportedError:
    return UnsupportedError(site.label, f"the base has it {words}", hint=leave_out(site))


def _missing(site: Site, adapter: Adapter, base: Model) -> MissingModuleError:
    nearest = base.nearest(site.module)
    return MissingModuleError(
        f"{adapter.path}: {site.label}",
        "the base has no such module",
        hint=f"nearest: {', '.join(nearest)}" if nearest else None,
    )
