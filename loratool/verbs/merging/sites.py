"""Turn the sites of one adapter into edits of the base's tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Final

from loratool.adapter.leaving import leave_out, own_name
from loratool.adapter.model import Adapter, Kind, Site
from loratool.adapter.problems import CONVERT_HINT, is_whole
from loratool.adapter.slots import Slot
from loratool.base.experts import assign_parameters
from loratool.base.fitting import Fit, fit
from loratool.base.model import Model
from loratool.base.orientation import folded_kernel
from loratool.base.region import Region
from loratool.errors import BaseModelError, MissingModuleError, UnsupportedError
from loratool.plan.model import AddDelta, Blend, ChangeWeight, Decompose, Residual
from loratool.schemes import scheme_named
from loratool.verbs.merging.context import Share
from loratool.verbs.merging.missing import missing_modules
from loratool.verbs.merging.parameters import add_bias, plan_parameters

__all__ = ["SitePlanner", "plan_sites"]

INPUT_LAYERS: Final = ("img_in", "x_embedder")
"""What Flux calls the layer that sees the image, and the control beside it."""
WHOLE_NORM: Final = ".key_norm.scale"


def plan_sites(share: Share, base: Model) -> None:
    """Add the edits of all sites to ``share``.

    Args:
        share: The adapter's part; filled in.
        base: The base.

    Raises:
        BaseModelError: A site has no place in the base, or does not fit it.
    """
    planner = SitePlanner(share, base)
    taken: dict[tuple[str, Region], Site] = {}
    missing: list[Site] = []
    for site in share.adapter.sites:
        try:
            places = planner.plan(site)
        except MissingModuleError:
            missing.append(site)
            continue
        for place in places:
            _take(taken, *place, share, site)
    if missing:
        raise missing_modules(share, missing, base)
    _check_apart(share, taken)


class SitePlanner:
    """What all sites of an adapter have in common when they are placed in a base.

    Args:
        share: The adapter's part, with its extras; filled in.
        base: The base.

    Raises:
        BaseModelError: Parameters that the configuration names cannot be told apart.
    """

    def __init__(self, share: Share, base: Model) -> None:
        self.share = share
        self.base = base
        self._assigned = assign_parameters(share.adapter, base)
        self._attention = {site.module for site in share.adapter.sites if not site.nesting}
        self._roles = scheme_named(share.adapter.scheme).roles
        self._resized = _replaced(share)

    def plan(self, site: Site) -> list[tuple[str, Region]]:
        """Add the edits of one site; return where they are.

        Raises:
            MissingModuleError: The base has no such module.
            BaseModelError: It does not fit there.
            UnsupportedError: It cannot be cut as the base is.
        """
        share, base, assigned = self.share, self.base, self._assigned
        if is_whole(site):
            return list(plan_parameters(share.at(site), site, base))
        site = self._with_magnitude(site)
        shape = site.variant.grown(site) or self._widened(site)
        if shape is not None:
            self._resized |= _grown(share, site, shape, base)
        places = fit(site, share.adapter, base, assigned, resized=self._resized)
        is_doubled = _is_attention_output(site, base, self._attention)
        for place in places:
            scale = _scale(site, share.adapter, assigned.get(site.label), place, base)
            weighed = share.at(site)
            _add_edits(weighed, place, base, 2 * scale if is_doubled else scale)
            for slot, factor in ((Slot.UP_BIAS, site.scaling.factor), (Slot.BIAS, 1.0)):
                if slot in site.slots:
                    add_bias(weighed, place, site.slots[slot], base, factor)
        return [(place.name, place.region) for place in places]

    def _widened(self, site: Site) -> tuple[int, ...] | None:
        """Return the shape of the input layer that a control LoRA of Flux is for.

        Its files do not say that the layer has more inputs; whole norms beside the factors are
        what they are told by.
        """
        is_input = site.module.rpartition(".")[2] in INPUT_LAYERS and site.is_plain
        if not is_input or site.kind is not Kind.LINEAR:
            return None
        extras = self.share.adapter.extras
        if not any(extra.name.endswith(WHOLE_NORM) for extra in extras):
            return None
        place = self.base.find(site.module, family=self.share.adapter.family)
        is_wider = place is not None and site.in_features > place.shape[1]
        return (site.out_features, site.in_features) if is_wider else None

    def _with_magnitude(self, site: Site) -> Site:
        """Return a site with magnitudes of outputs as ``(out,)``, of inputs as ``(1, in, …)``."""
        stored = site.slots.get(Slot.MAGNITUDE)
        if stored is None:
            return site
        shape = self._roles.magnitude(stored).shape
        viewed = replace(stored, spec=replace(stored.spec, shape=shape))
        return replace(site, slots={**site.slots, Slot.MAGNITUDE: viewed})


def _check_apart(share: Share, taken: Mapping[tuple[str, Region], Site]) -> None:
    """Refuse sites that change some rows of a tensor twice: a projection, and one it is part of.

    Raises:
        BaseModelError: There are two.
    """
    spans: dict[tuple[str, int, int], list[tuple[Region, Site]]] = defaultdict(list)
    for (name, region), site in taken.items():
        if region.experts == 1:
            spans[name, region.first_column, region.columns].append((region, site))
    for (name, *_), found in spans.items():
        for (before, one), (after, other) in pairwise(sorted(found, key=_rows)):
            if after.first_row < before.first_row + before.rows and one.label != other.label:
                raise BaseModelError(
                    share.where(own_name(other)),
                    f"means rows of {name!r} that {own_name(one)!r} means too",
                    hint=leave_out(other),
                )


def _rows(item: tuple[Region, Site]) -> tuple[int, int]:
    return item[0].first_row, item[0].rows


def _take(
    taken: dict[tuple[str, Region], Site], name: str, region: Region, share: Share, site: Site
) -> None:
    """Note that a site changes part of a tensor.

    Raises:
        BaseModelError: Another one changes the same.
    """
    other = taken.setdefault((name, region), site).label
    if other != site.label:
        raise BaseModelError(
            share.where(own_name(site)),
            f"means the same tensor {name!r} as {other!r}",
            hint=leave_out(site),
        )


def _grown(
    share: Share, site: Site, shape: tuple[int, ...], base: Model
) -> dict[str, tuple[int, ...]]:
    """Note that a weight gets more inputs before anything is added; return its shape by name.

    Raises:
        BaseModelError: The weight is no smaller than it would become.
    """
    place = base.find(site.module, family=share.adapter.family)
    if place is None:
        return {}
    piece = place.pieces[0]
    old = piece.tensor.spec.shape
    is_larger = len(old) == len(shape) and all(a <= b for a, b in zip(old, shape, strict=True))
    if not (place.is_whole and is_larger and old[2:] == shape[2:]):
        raise BaseModelError(
            share.where(site.label),
            f"is for a weight of shape {list(shape)}, and the base has {list(old)}, which does not "
            "grow to that",
            hint="is this the base that the adapter was trained on?",
            code="LT022",
        )
    if old == shape:
        return {}
    share.changes[piece.name].grown = shape
    share.notes.append(
        f"{piece.name!r} grew from {list(old)} to {list(shape)}, with zeros for the new inputs; "
        "the model has to be loaded with as many"
    )
    return {piece.name: shape}


def _replaced(share: Share) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the adapter replaces, by the base's names."""
    shapes = {name: changes.shape for name, changes in share.changes.items()}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _is_attention_output(site: Site, base: Model, adapted: set[str]) -> bool:
    """Whether a site is the output projection inside an adapted ``nn.MultiheadAttention``.

    PEFT adds that delta twice, in training and in merging alike: once as part of the attention,
    once as a layer of its own. Only twice the delta is what the adapter was trained to do.
    """
    parent, _, leaf = site.module.rpartition(".")
    if leaf != "out_proj" or not site.nesting or parent not in adapted:
        return False
    return base.tensor(parent, "in_proj_weight") is not None


def _scale(site: Site, adapter: Adapter, parameter: str | None, place: Fit, base: Model) -> float:
    """Return the scale of a site, now that the parameter it adapts is known."""
    if adapter.config is None or not site.parameters:
        divided = site.scaling.factor
        has_alpha = site.scaling.alpha is not None
        return divided * folded_kernel(site, base.shape(place.name)) if has_alpha else divided
    if parameter is None:
        return adapter.config.scaling_for(site.pattern_path, site.rows).factor
    return adapter.config.scaling_for(parameter, site.rows // place.region.experts).factor


def _add_edits(share: Share, place: Fit, base: Model, scale: float) -> None:
    adapter, site, name, region = share.adapter, place.site, place.name, place.region
    edits = share.changes[name].edits
    kind = adapter.config.init.residual if adapter.config else None
    kind = site.variant.residual or kind
    # A stored copy of the base weight is the one that the initialisation has already changed.
    has_copy = any(isinstance(e, Blend) for e in edits) or share.changes[name].base is not None
    is_plain = not site.parameters and site.kind.value == "linear"
    if kind is not None and is_plain and not has_copy:
        _check_whole(share, place, f"initialised with {kind}")
        if kind == "olora" and region.transposed:
            raise BaseModelError(share.where(site.label), "OLoRA on a Conv1D layer is not defined")
        edits.append(Residual(kind, site.rank, scale, share.weight))
    if Slot.MAGNITUDE in site.slots:
        edits.append(_decomposed(share, place, base, scale))
    elif site.variant.has_factors and (site.is_plain or not site.variant.has_change):
        if not site.is_plain:
            site.variant.check(site, base.shape(name))
        edits.append(AddDelta(site, share.weight * scale, region, place.first))
    else:
        _add_change(share, place, base, scale)


def _decomposed(share: Share, place: Fit, base: Model, scale: float) -> Decompose:
    """Return a DoRA of a module, or of those of its outputs that lie in one tensor.

    Raises:
        UnsupportedError: Magnitudes of inputs need all outputs, and these lie apart.
    """
    site = place.site
    if not site.is_plain:
        site.variant.check(site, base.shape(place.name))
    is_by_input = len(site.slots[Slot.MAGNITUDE].spec.shape) > 1
    if is_by_input and place.is_cut:
        raise UnsupportedError(
            share.where(site.label),
            "is a DoRA with magnitudes of the inputs (LyCORIS, wd_on_out=False), whose norms run "
            f"over all outputs; the base has those in several tensors, such as {place.name!r}",
            hint=leave_out(site),
        )
    return Decompose(
        site, scale, share.weight, place.region, is_by_input, place.first, place.outputs
    )


def _add_change(share: Share, place: Fit, base: Model, scale: float) -> None:
    """Let a site's variant change a weight, and the bias beside it where that changes too."""
    site, region, weight = place.site, place.region, share.weight
    if weight != 1 and not site.variant.takes_weights:
        raise UnsupportedError(
            share.where(site.label),
            f"is {site.variant.words}; a weight of {weight:g} means nothing, all of it or none can "
            "be merged",
            hint="make it a plain LoRA first, which takes weights: loratool convert ADAPTER "
            "--to peft --to-lora --base BASE --rank R -o OUT",
        )
    if site.variant.has_factors:
        site.variant.check(site, base.shape(place.name))
    part = (place.first, place.outputs)
    edit = ChangeWeight(site, scale, weight, region, False, *part)
    share.changes[place.name].edits.append(edit)
    bias, rows = place.bias
    if site.variant.changes_bias(site) and base.holds(bias):
        beside = (base.weight(place.name), region) if site.variant.bias_needs_weight else None
        edit = ChangeWeight(site, scale, weight, rows, True, *part, beside)
        share.changes[bias].edits.append(edit)


def _check_whole(share: Share, place: Fit, words: str) -> None:
    """Refuse what takes something out of a whole weight where the base has it otherwise.

    Raises:
        UnsupportedError: It has it in one with others, or in several.
    """
    if place.is_cut or not place.is_whole:
        raise UnsupportedError(
            share.where(place.site.label),
            f"is {words}, which needs its whole weight, and {place.name!r} of the base is not "
            "that alone, or not all of it",
            hint=CONVERT_HINT,
        )
