"""Dotted names behind a component, of diffusers or of original checkpoints; and numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from loratool.adapter.build import strip_wrappers
from loratool.adapter.model import Site
from loratool.names.diffusion import family_named
from loratool.names.pipelines import (
    COMFY_ENCODERS,
    component_of,
    encoder_component,
    is_text_model,
    split_native,
)
from loratool.names.positions import text_paths, unet_paths
from loratool.ops.naming.paths import (
    Names,
    family_name,
    fitting_families,
    hub_paths,
    sole_name,
)

__all__ = ["from_native", "from_pipeline", "from_positions"]


def from_pipeline(modules: Sequence[str]) -> Names:
    """Return what dotted paths stand for, with or without their component."""
    family = family_name(modules)
    backbone = family_named(family).backbone if family else None
    paths = {}
    for module in modules:
        component, local = component_of(module)
        if component is None and is_text_model(local):
            component = "text_encoder"
        elif component is None:
            component = backbone
        local = strip_wrappers(local)
        paths[module] = (f"{component}.{local}" if component else local,)
    return Names(paths, family)


def from_native(modules: Sequence[str]) -> Names:
    """Return what ComfyUI's paths stand for."""
    split = {module: split_native(module) for module in modules}
    backbone = [local for part, local in split.values() if part == "diffusion_model"]
    families = fitting_families(backbone)
    encoders = {part for part, _ in split.values()} - {"diffusion_model", ""}
    name = sole_name(backbone) or _family_of_encoders(encoders)
    paths = {}
    for module, (part, local) in split.items():
        if part == "diffusion_model":
            paths[module] = hub_paths(local, families)
        else:
            component = encoder_component(part, name, COMFY_ENCODERS)
            paths[module] = (f"{component}.{local}",) if component else ()
    return Names(paths, name)


def _family_of_encoders(encoders: Collection[str]) -> str | None:
    """Return the family that text encoders alone tell, by ComfyUI's names."""
    if "t5xxl" in encoders:
        return "sd3" if "clip_g" in encoders else "flux"
    return "sdxl" if "clip_g" in encoders else None


def from_positions(sites: Sequence[Site]) -> Names:
    """Return what cloneofsimo's numbers stand for, by the shapes of all modules."""
    groups: dict[str, dict[int, Site]] = defaultdict(dict)
    for site in sites:
        component, _, number = site.module.partition(":")
        groups[component][int(number)] = site
    paths: dict[str, tuple[str, ...]] = {}
    for component, numbered in groups.items():
        ordered = [numbered[number] for number in sorted(numbered)]
        is_whole = sorted(numbered) == list(range(len(numbered)))
        if not is_whole:
            found = None
        elif component == "unet":
            found = unet_paths([(site.out_features, site.in_features) for site in ordered])
        else:
            found = text_paths(len(ordered))
        for place, site in enumerate(ordered):
            paths[site.module] = (f"{component}.{found[place]}",) if found else ()
    return Names(paths, "sd1" if "unet" in groups else None)
