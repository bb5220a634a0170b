"""Turn the sites of one adapter into edits of the base's tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise

from loratool.adapter.model import Adapter, Site
from loratool.adapter.slots import Slot
from loratool.base.experts import assign_parameters
from loratool.base.fitting import Fit, fit
from loratool.base.model import Model
from loratool.base.region import Region
from loratool.errors import BaseModelError, UnsupportedError
from loratool.plan.model import AddBias, AddDelta, Blend, ChangeWeight, Decompose, Residual
from loratool.verbs.merging.context import Share

__all__ = ["plan_sites", "replaced_shapes"]


def plan_sites(share: Share, base: Model) -> None:
    """Add the edits of all sites to ``share``.

    Args:
        share: The adapter's part; filled in.
        base: The base.

    Raises:
        BaseModelError: A site has no place in the base, or does not fit it.
    """
    assigned = assign_parameters(share.adapter, base)
    resized = replaced_shapes(share)
    attention = {s.module for s in share.adapter.sites if not s.nesting}
    taken: dict[tuple[str, Region], str] = {}
    for site in share.adapter.sites:
        is_doubled = _is_attention_output(site, base, attention)
        for place in fit(site, share.adapter, base, assigned, resized=resized):
            other = taken.setdefault((place.name, place.region), site.label)
            if other != site.label:
                raise BaseModelError(
                    share.where(site.label), f"means the same tensor {place.name!r} as {other!r}"
                )
            scale = _scale(site, share.adapter, assigned.get(site.label), place.region)
            weighed = share.at(site)
            _add_edits(weighed, place, base, 2 * scale if is_doubled else scale)
            if Slot.UP_BIAS in site.slots:
                _add_bias(weighed, place, base)
    _check_apart(share, taken)


def _check_apart(share: Share, taken: Mapping[tuple[str, Region], str]) -> None:
    """Refuse sites that change some rows of a tensor twice: a projection, and one it is part of.

    Raises:
        BaseModelError: There are two.
    """
    rows: dict[tuple[str, int, int], list[tuple[int, int, str]]] = defaultdict(list)
    for (name, region), label in taken.items():
        if region.experts == 1:
            span = (region.first_row, region.first_row + region.rows, label)
            rows[name, region.first_column, region.columns].append(span)
    for (name, *_), spans in rows.items():
        for (_, end, one), (first, _, other) in pairwise(sorted(spans)):
            if first < end and one != other:
                raise BaseModelError(
                    share.where(other),
                    f"means rows of {name!r} that {one!r} means too",
                    hint="leave out one of them with --skip",
                )


def replaced_shapes(share: Share) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the adapter replaces, by the base's names."""
    return {
        name: changes.source.spec.shape
        for name, changes in share.changes.items()
        if changes.source is not None
    }


def _is_attention_output(site: Site, base: Model, adapted: set[str]) -> bool:
    """Whether a site is the output projection inside an adapted ``nn.MultiheadAttention``.

    PEFT adds that delta twice, in training and in merging alike: once as part of the attention,
    once as a layer of its own. Only twice the delta is what the adapter was trained to do.
    """
    parent, _, leaf = site.module.rpartition(".")
    if leaf != "out_proj" or not site.nesting or parent not in adapted:
        return False
    return base.tensor(parent, "in_proj_weight") is not None


def _scale(site: Site, adapter: Adapter, parameter: str | None, region: Region) -> float:
    """Return the scale of a site, now that the parameter it adapts is known."""
    if adapter.config is None or not site.parameters:
        return site.scaling.factor
    if parameter is None:
        return adapter.config.scaling_for(site.pattern_path, site.rows).factor
    return adapter.config.scaling_for(parameter, site.rows // region.experts).factor


def _add_edits(share: Share, place: Fit, base: Model, scale: float) -> None:
    adapter, site, name, region = share.adapter, place.site, place.name, place.region
    edits = share.changes[name].edits
    kind = adapter.config.init.residual if adapter.config else None
    kind = site.variant.residual or kind
    # A stored copy of the base weight is the one that the initialisation has already changed.
    has_copy = any(isinstance(e, Blend) for e in edits) or share.changes[name].base is not None
    is_plain = not site.parameters and site.kind.value == "linear"
    if kind is not None and is_plain and not has_copy:
        _check_whole(share, place, f"initialised with {kind}", is_cut=place.is_cut)
        if kind == "olora" and region.transposed:
            raise BaseModelError(share.where(site.label), "OLoRA on a Conv1D layer is not defined")
        edits.append(Residual(kind, site.rank, scale, share.weight))
    if site.variant.is_decomposed:
        _check_whole(share, place, "a DoRA")
        edits.append(Decompose(site, scale, share.weight, region))
    elif site.variant.has_factors:
        if not site.is_plain:
            site.variant.check(site, base.shape(name))
        edits.append(AddDelta(site, share.weight * scale, region))
    else:
        _add_change(share, place, base, scale)


def _add_change(share: Share, place: Fit, base: Model, scale: float) -> None:
    """Let a site's variant change a weight, and the bias beside it where that changes too."""
    site, region = place.site, place.region
    share.changes[place.name].edits.append(ChangeWeight(site, scale, share.weight, region))
    bias = place.name.removesuffix("weight") + "bias"
    if site.variant.changes_bias(site) and _has(base, bias):
        first = region.first_column if region.transposed else region.first_row
        count = region.columns if region.transposed else region.rows
        rows = Region(count, 1, first_row=first)
        edit = ChangeWeight(site, scale, share.weight, rows, is_bias=True)
        share.changes[bias].edits.append(edit)


def _has(base: Model, name: str) -> bool:
    return name in base.tensors or name in base.hidden


def _check_whole(share: Share, place: Fit, words: str, *, is_cut: bool = False) -> None:
    """Refuse what is defined by a whole weight where the base has it in one with others, or cut.

    Raises:
        UnsupportedError: It is one.
    """
    if is_cut or not place.is_whole:
        raise UnsupportedError(
            share.where(place.site.label),
            f"is {words}, and {place.name!r} of the base is not its weight alone, or not all of it",
            hint="make it a plain LoRA: loratool convert ADAPTER --to-lora --base BASE --rank R",
        )


def _add_bias(share: Share, place: Fit, base: Model) -> None:
    _check_whole(share, place, "trained with a bias (lora_bias)")
    site = place.site
    bias = place.name.removesuffix("weight") + "bias"
    if not _has(base, bias):
        raise BaseModelError(
            share.where(site.label),
            f"trains a bias (lora_bias), but the base has no {bias!r} to add it to",
            hint="add a zero bias to the base, if its architecture allows one",
        )
    tensor = site.slots[Slot.UP_BIAS]
    if tensor.spec.shape != base.shape(bias):
        raise BaseModelError(
            share.where(site.label),
            f"its bias has shape {list(tensor.spec.shape)}, the base's {list(base.shape(bias))}",
        )
    share.changes[bias].edits.append(AddBias(tensor, share.weight * site.scaling.factor))
