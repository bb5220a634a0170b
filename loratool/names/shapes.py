"""What shapes tell: experts stacked in one tensor, idle kernels, families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratool.adapter.model import Kind, Site
from loratool.adapter.slots import Slot
from loratool.files.spec import StoredTensor
from loratool.names.families import claiming
from loratool.names.pipelines import component_of
from loratool.names.switched import expert_path

__all__ = ["family_by_shape", "one_site_an_expert", "without_idle_kernels"]


def family_by_shape(sites: Sequence[Site], paths: Mapping[str, tuple[str, ...]]) -> str | None:
    """Return which of two models with the same native names has layers of these proportions."""
    votes = set()
    for site in sites:
        found = paths.get(site.module, ())
        name = found[0] if len(found) == 1 else ""
        component, local = component_of(name)
        if component is None or not site.in_features:
            continue
        votes |= {
            family.name
            for family in claiming([local])
            for proportion in family.proportions
            if family.backbone == component
            and proportion.fits(local, site.out_features, site.in_features)
        }
    return votes.pop() if len(votes) == 1 else None


def one_site_an_expert(site: Site) -> list[Site]:
    """Return one site for each expert of a module that stacks their factors (mlx-lm)."""
    down, up = site.down, site.up
    if down is None or up is None or not len(down.spec.shape) == len(up.spec.shape) == 3:
        return [site]
    paths = [expert_path(site.module, index) for index in range(down.spec.shape[0])]
    if None in paths or up.spec.shape[0] != len(paths) or up.spec.shape[2] != down.spec.shape[1]:
        return [site]
    rank = down.spec.shape[1]
    scaling = site.scaling
    multiplier = scaling.multiplier
    alpha = scaling.alpha if multiplier is None else multiplier * rank
    return [
        replace(
            site,
            module=path or "",
            kind=Kind.LINEAR,
            slots={Slot.DOWN: _part(down, index), Slot.UP: _part(up, index)},
            scaling=replace(scaling, alpha=alpha, rank=rank),
        )
        for index, path in enumerate(paths)
    ]


def _part(stored: StoredTensor, index: int) -> StoredTensor:
    """Return one of the matrices that a tensor of three dimensions holds."""
    shape = stored.spec.shape[1:]
    size = stored.spec.nbytes // stored.spec.shape[0]
    return replace(
        stored, spec=replace(stored.spec, shape=shape), offset=stored.offset + index * size
    )


def _is_attention(module: str) -> bool:
    leaf = module.rpartition(".")[2]
    return leaf in ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj") or module.endswith(
        (".to_out.0", ".ff.net.0.proj", ".ff.net.2")
    )


def without_idle_kernels(site: Site) -> Site:
    """Return a linear layer of attention as such where its factors have kernels of 1 × 1."""
    if not _is_attention(site.module):
        return site
    slots = dict(site.slots)
    for slot in (Slot.DOWN, Slot.UP):
        stored = slots.get(slot)
        if stored is None or stored.strides is not None or set(stored.spec.shape[2:]) - {1}:
            return site
        slots[slot] = replace(stored, spec=replace(stored.spec, shape=stored.spec.shape[:2]))
    return replace(site, slots=slots, kind=Kind.LINEAR)
