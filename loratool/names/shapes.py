"""What shapes tell: experts stacked in one tensor, idle kernels, families."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from loratool.adapter.model import Kind, Site
from loratool.adapter.slots import Slot
from loratool.files.spec import StoredTensor
from loratool.names.families import claiming, family_named, unrefined
from loratool.names.family import Family
from loratool.names.paths import fitting_families
from loratool.names.pipelines import ENCODERS, component_of
from loratool.names.switched import expert_path

__all__ = ["family_by_shape", "one_site_an_expert", "without_idle_kernels"]


def family_by_shape(
    sites: Sequence[Site], paths: Mapping[str, tuple[str, ...]], named: str | None
) -> str | None:
    """Return the family that the shapes of layers tell, of those that their names allow.

    Args:
        sites: The adapter's, as it spells them.
        paths: What they stand for.
        named: The family that the names tell, if they do, which holds unless layers are as wide
            as those of another one that has them all.
    """
    layers = {
        local: (site.out_features, site.in_features)
        for site in sites
        for component, local in map(component_of, paths.get(site.module, ())[:1])
        if component not in (None, *ENCODERS) and site.in_features
    }
    if named is not None:
        has_own = _has_widths(family_named(named), layers)
        others = [
            family
            for family in claiming(layers)
            if (has_own is False or family.refines == named) and _has_widths(family, layers)
        ]
        fitting = fitting_families(layers) if others else []
        return _only(family for family in fitting if family in others) or named
    fitting = fitting_families(layers)
    votes = {
        family.name
        for local, (outputs, inputs) in layers.items()
        for family in claiming([local])
        for proportion in family.proportions
        if proportion.fits(local, outputs, inputs)
    }
    return _only(f for f in fitting if f.name in votes) or _only(
        unrefined([f for f in fitting if _has_widths(f, layers)])
    )


def _only(found: Iterable[Family]) -> str | None:
    names = [family.name for family in found]
    return names[0] if len(names) == 1 else None


def _has_widths(family: Family, layers: Mapping[str, tuple[int, int]]) -> bool | None:
    """Whether layers are as wide as those of a family's models; ``None`` if that is not known."""
    found = [
        inputs in widths
        for local, (_, inputs) in layers.items()
        for ending, widths in family.widths.items()
        if local.endswith(ending)
    ]
    return all(found) if found else None


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
