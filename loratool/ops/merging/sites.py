"""Turn the sites of one adapter into edits of the base's tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from loratool.adapter.model import Adapter, Site
from loratool.adapter.slots import Slot
from loratool.errors import BaseModelError
from loratool.names.pipelines import component_of
from loratool.ops.merging.context import BaseView, Share
from loratool.ops.merging.experts import assign_parameters, locate_in_fused, locate_parameter
from loratool.ops.merging.orientation import region_for
from loratool.ops.naming.paths import other_names
from loratool.ops.plan import AddBias, AddDelta, Blend, Decompose, Region, Residual

__all__ = ["locate_site", "plan_sites", "replaced_shapes"]

WEIGHT_LEAVES = ("weight", "in_proj_weight")


def plan_sites(share: Share, base: BaseView, *, head: tuple[str, tuple[int, ...]] | None) -> None:
    """Add the edits of all sites to ``share``.

    Args:
        share: The adapter's part; filled in.
        base: The base.
        head: Name and shape of a tied output head that the base does not store, if any.

    Raises:
        BaseModelError: A site has no place in the base, or does not fit it.
    """
    assigned = assign_parameters(share.adapter, base)
    resized = replaced_shapes(share)
    attention = {s.module for s in share.adapter.sites if not s.nesting}
    taken: dict[tuple[str, Region], str] = {}
    for site in share.adapter.sites:
        places = locate_site(site, share.adapter, base, assigned, head, resized=resized)
        for name, region in places:
            other = taken.setdefault((name, region), site.label)
            if other != site.label:
                raise BaseModelError(
                    share.where(site.label), f"means the same tensor {name!r} as {other!r}"
                )
            scale = _scale(site, share.adapter, assigned.get(site.label), region)
            if _is_attention_output(site, base, attention):
                scale *= 2
            _add_edits(share, site, name, region, scale)
        if Slot.UP_BIAS in site.slots:
            _add_bias(share, site, places[0][0], base)


def replaced_shapes(share: Share) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the adapter replaces, by the base's names."""
    return {
        name: changes.source.spec.shape
        for name, changes in share.changes.items()
        if changes.source is not None
    }


def locate_site(
    site: Site,
    adapter: Adapter,
    base: BaseView,
    assigned: dict[str, str],
    head: tuple[str, tuple[int, ...]] | None = None,
    *,
    resized: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> list[tuple[str, Region]]:
    """Return the tensors of the base that ``site`` changes, and where in them.

    ``resized`` holds the shapes of tensors that the adapter replaces, by name.

    Raises:
        BaseModelError: There is none; the message names the nearest modules.
    """
    if site.label in assigned:
        return locate_parameter(site, assigned[site.label], adapter, base)
    module = base.index.find(site.module)
    if module is None:
        names = map(base.index.find, other_names(site.module, adapter.family))
        module = next((name for name in names if name is not None), None)
    is_flagged = bool(adapter.field("fan_in_fan_out"))
    for leaf in WEIGHT_LEAVES:
        if module is not None and leaf in base.index.parameters.get(module, ()):
            name = f"{module}.{leaf}"
            shape = resized.get(name) or base.shape(name)
            return [(name, region_for(site, module, shape, base, is_flagged=is_flagged))]
    fused = locate_in_fused(site, base)
    if fused is not None:
        return [fused]
    if head is not None and _is_head(site.module, head[0]):
        shape = resized.get(head[0]) or head[1]
        return [(head[0], region_for(site, site.module, shape, base))]
    nearest = base.index.nearest(site.module)
    raise BaseModelError(
        f"{adapter.path}: {site.label}",
        "the base has no such module",
        hint=_without_component(site, adapter)
        or (f"nearest: {', '.join(nearest)}" if nearest else None),
    )


def _without_component(site: Site, adapter: Adapter) -> str | None:
    """Return how to leave out the component of a pipeline that ``site`` is in."""
    component, local = component_of(site.module, adapter.components)
    others = {component_of(other.module, adapter.components)[0] for other in adapter.sites}
    if component is None or len(others) < 2:
        return None
    key = next(iter(site.slots.values())).spec.name
    for inside in (local, local.replace(".", "_"), local.removeprefix("text_model.")):
        before = key.partition(inside)[0]
        if before and before != key:
            return f"leave out the {component} with --skip '^{re.escape(before)}'"
    return None


def _is_head(module: str, name: str) -> bool:
    return module.rpartition(".")[2] == name.removesuffix(".weight").rpartition(".")[2]


def _is_attention_output(site: Site, base: BaseView, adapted: set[str]) -> bool:
    """Whether a site is the output projection inside an adapted ``nn.MultiheadAttention``.

    PEFT adds that delta twice, in training and in merging alike: once as part of the attention,
    once as a layer of its own. Only twice the delta is what the adapter was trained to do.
    """
    parent, _, leaf = site.module.rpartition(".")
    if leaf != "out_proj" or not site.nesting or parent not in adapted:
        return False
    return base.index.find(parent, parameter="in_proj_weight") is not None


def _scale(site: Site, adapter: Adapter, parameter: str | None, region: Region) -> float:
    """Return the scale of a site, now that the parameter it adapts is known."""
    if adapter.config is None or not site.parameters:
        return site.scaling.factor
    if parameter is None:
        return adapter.config.scaling_for(site.pattern_path, site.rows).factor
    return adapter.config.scaling_for(parameter, site.rows // region.experts).factor


def _add_edits(share: Share, site: Site, name: str, region: Region, scale: float) -> None:
    adapter = share.adapter
    edits = share.changes[name].edits
    kind = adapter.config.init.residual if adapter.config else None
    if site.variant == "kasa":
        kind = "kasa"
    # A stored copy of the base weight is the one that the initialisation has already changed.
    has_copy = any(isinstance(e, Blend) for e in edits) or share.changes[name].base is not None
    is_plain = not site.parameters and site.kind.value == "linear"
    if kind is not None and is_plain and not has_copy:
        if kind == "olora" and region.transposed:
            raise BaseModelError(share.where(site.label), "OLoRA on a Conv1D layer is not defined")
        edits.append(Residual(kind, site.rank, scale, share.weight))
    if site.variant == "dora":
        edits.append(Decompose(site, scale, share.weight, region))
    else:
        edits.append(AddDelta(site, share.weight * scale, region))


def _add_bias(share: Share, site: Site, weight_name: str, base: BaseView) -> None:
    bias = weight_name.removesuffix("weight") + "bias"
    if bias not in base.tensors:
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
